"""Headless Chromium, over files only."""

import json
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

NEEDED = (
    "Chromium and its driver are needed for the tests of the HTML report:"
    " apt-get install chromium chromium-driver"
)


def start():
    """A browser that logs its console and its requests."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, NEEDED
    assert driver, NEEDED  # named below, so that selenium downloads none
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # In a container there is no sandbox, and /dev/shm is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def look(driver, width=1280, height=900, theme="light", touch=False):
    """How the next page is seen. Without motion, so that nothing is scrolling when it is asked."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    features = [
        {"name": "prefers-color-scheme", "value": theme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requests(driver):
    """What was asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]
