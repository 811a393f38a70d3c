"""The HTML report: what is in the file, and (slow) what a browser makes of it."""

import dataclasses
import json
import re
import stat
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import browser
import report_samples as samples
from fxdistill.base import figures
from fxdistill.report.faces.html import html

MiB = 2**20


class Scripts(HTMLParser):
    """The text of each script element by its id, and of the title."""

    def __init__(self, page):
        super().__init__()
        self.found, self.name, self.tags = {}, None, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.name = dict(attrs).get("id", tag) if tag in ("script", "title") else None

    def handle_endtag(self, tag):
        self.name = None

    def handle_data(self, data):
        if self.name:
            self.found[self.name] = self.found.get(self.name, "") + data


# ---- the file


@pytest.mark.parametrize("name", samples.ALL)
def test_the_page_holds_the_report(name):
    report = samples.ALL[name]()
    parsed = Scripts(html(report))
    assert json.loads(parsed.found["report"]) == report.to_dict()
    assert set(parsed.found) == {"report", "folded", "script", "title"}


def test_names_cannot_end_what_they_stand_in():
    page = html(samples.nasty())
    parsed = Scripts(page)
    assert samples.NASTY in parsed.found["title"]
    small = Scripts(html(samples.small()))
    assert small.found["title"].startswith("LlamaForCausalLM ← Llama4ForCausalLM")
    assert [tag for tag, _ in parsed.tags].count("script") == 3
    assert page.count("</script>") == 3
    assert "{{" not in parsed.found["script"]


def test_nothing_is_fetched():
    page = html(samples.small())
    known = ["http://www.w3.org/2000/svg"]  # the name of a namespace
    assert re.findall(r"https?://[^\s\"'`)]+", page) == known
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", page)
    assert "default-src 'none'" in page
    linked = [a["href"] for tag, a in Scripts(page).tags if tag == "link"]
    assert linked == ["data:,"]


def test_eighty_layers_are_less_than_two_mebibytes():
    assert len(html(samples.large()).encode()) < 2 * MiB


def test_a_number_that_json_lacks_is_a_text():
    report = samples.small()
    pair = replace(report.pairs[0], weight=float("nan"))
    page = html(replace(report, pairs=(pair,)))
    assert '"weight":"nan"' in page
    assert "NaN" not in re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page, re.S)[1]


def test_written_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert samples.small().to_html(str(path)) == path
    assert path.read_text(encoding="utf-8") == html(samples.small())
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_link_stays_one_and_what_it_names_is_written(tmp_path):
    (tmp_path / "behind").mkdir()
    target, link = tmp_path / "behind" / "report.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    assert samples.small().to_html(link) == link
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == html(samples.small())
    assert list(target.parent.iterdir()) == [target]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("h" * 250)
    assert samples.small().to_html(path) == path
    assert path.is_file()


def test_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    written = Path.write_bytes

    def half(self, data):
        written(self, data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        samples.small().to_html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- in a browser


@pytest.fixture(scope="module")
def chromium():
    driver = browser.start()
    yield driver
    driver.quit()


@pytest.fixture
def show(chromium, tmp_path):
    """Open a sample; afterwards the console is empty and nothing but the file was asked for."""
    opened = []
    chromium.get("about:blank")
    chromium.get_log("browser")
    browser.requests(chromium)

    def opening(name, report=None, **how):
        path = tmp_path / f"{name}.html"
        (report or samples.ALL[name]()).to_html(path)
        browser.look(chromium, **how)
        chromium.get(path.as_uri())
        opened.append(path.as_uri())
        if name != "nasty":
            wait(chromium, ".block")
        return chromium

    yield opening
    assert chromium.get_log("browser") == []
    assert set(browser.requests(chromium)) - {"data:,"} == set(opened)


def wait(driver, selector):
    return WebDriverWait(driver, 20).until(lambda d: d.find_elements(By.CSS_SELECTOR, selector))


def all_of(driver, selector):
    return driver.find_elements(By.CSS_SELECTOR, selector)


def tip(driver):
    found = driver.find_element(By.ID, "tip")
    return found.text if found.is_displayed() else None


def hover(driver, element):
    ActionChains(driver).move_to_element(element).perform()


# Texts of one figure that lie on each other.
OVERLAPS = """
return [...document.querySelectorAll("svg")].flatMap((figure) => {
  const texts = [...figure.querySelectorAll("text")].map((node) => [
    node.textContent,
    node.getBoundingClientRect(),
  ]);
  return texts.flatMap(([one, a], i) =>
    texts
      .slice(i + 1)
      .filter(([_, b]) => a.left < b.right - 1 && b.left < a.right - 1)
      .filter(([_, b]) => a.top < b.bottom - 4 && b.top < a.bottom - 4)
      .map(([other]) => `${one} / ${other}`),
  );
});
"""


def touch(driver, element):
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    send = driver.execute_cdp_cmd
    send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    time.sleep(0.5)  # a tap is told from a double tap, then from a press


@pytest.mark.slow
@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("width", [1280, 390])
def test_every_report_opens_and_fits(show, name, width):
    driver = show(name, width=width)
    for button in all_of(driver, "#unfold"):
        button.click()
    scrolled = driver.execute_script("return document.documentElement.scrollWidth")
    assert scrolled <= width
    beyond = driver.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter((node) => {"
        "  const box = node.getBoundingClientRect();"
        "  return box.width && (box.right > innerWidth + 1 || box.left < -1);"
        "}).map((node) => node.outerHTML.slice(0, 200))"
    )
    assert beyond == []
    assert driver.execute_script(OVERLAPS) == []


@pytest.mark.slow
def test_a_pair_explains_itself_and_lights_both_ends(show):
    driver = show("small")
    told = driver.find_element(By.TAG_NAME, "main").text
    assert "6 pairs: 3 of 3 blocks of the student, 3 of 6 blocks of the teacher." in told
    pairs, own = all_of(driver, ".pair"), "model.layers.1.mlp"
    assert len(pairs) == 6
    (pair,) = [p for p in pairs if p.get_attribute("aria-label").startswith(own)]
    hover(driver, pair)
    text = tip(driver)
    for part in ("model.layers.1.mlp", "← model.layers.3.mlp", "mse", "Linear 128 → 256"):
        assert part in text
    assert "[8, 128, 128] float32" in text
    assert "[8, 128, 256] float32" in text
    lit = [block.get_attribute("aria-label") for block in all_of(driver, ".block.on")]
    assert lit == ["student model.layers.1", "teacher model.layers.3"]
    driver.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    assert tip(driver) is None


@pytest.mark.slow
def test_placements_are_in_the_tooltip(show):
    driver = show("mesh")
    hover(driver, all_of(driver, ".pair")[0])
    assert "Replicate(), Shard(dim=1)" in tip(driver)
    assert "Replicate(), Partial(sum)" in tip(driver)


@pytest.mark.slow
def test_runs_unfold_and_fold(show):
    driver = show("large")
    assert len(all_of(driver, ".block")) == 8
    bundled = all_of(driver, ".pair")
    assert len(bundled) == 2
    hover(driver, bundled[0])
    assert "model.layers.{0..31}.self_attn" in tip(driver)
    assert "31←79" in tip(driver)
    run = driver.find_element(By.CSS_SELECTOR, ".block.run.student")
    run.click()
    assert len(all_of(driver, ".block")) == 8 + 32
    assert len(all_of(driver, ".pair")) == 64
    driver.find_element(By.ID, "unfold").click()
    assert len(all_of(driver, ".block")) == 8 + 32 + 80
    driver.find_element(By.ID, "fold").click()
    assert len(all_of(driver, ".block")) == 8


@pytest.mark.slow
def test_the_keyboard_does_what_the_pointer_does(show):
    driver = show("large")
    driver.find_element(By.ID, "fold").click()
    keys = ActionChains(driver)
    keys.send_keys(Keys.TAB, Keys.ARROW_DOWN).perform()  # from the button into the figure
    assert "model.layers.{0..31}" in tip(driver)
    assert "attention, MLP" in tip(driver)
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert len(all_of(driver, ".block")) == 8 + 32
    focused = driver.switch_to.active_element
    assert focused.get_attribute("aria-expanded") == "true"
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT).perform()
    assert "model.layers.0.self_attn" in tip(driver)
    driver.execute_script("document.getElementById('timeline').focus()")
    ActionChains(driver).send_keys(Keys.HOME).perform()
    assert "forward, teacher model.layers.0" in tip(driver)
    ActionChains(driver).send_keys(Keys.END).perform()
    assert "backward, model.layers.0.self_attn" in tip(driver)


@pytest.mark.slow
def test_a_finger_does_so_too(show):
    driver = show("small", width=390, touch=True)
    touch(driver, all_of(driver, ".pair path.hit")[3])
    assert "← model.layers.1.mlp" in tip(driver)
    touch(driver, driver.find_element(By.TAG_NAME, "h1"))
    assert tip(driver) is None
    touch(driver, driver.find_element(By.CSS_SELECTOR, "#timeline .peak"))
    assert tip(driver).startswith("73.3 MiB")
    touch(driver, driver.find_element(By.CSS_SELECTOR, ".block.run.teacher"))
    assert len(all_of(driver, ".block")) == 7 + 4
    assert tip(driver) is None


@pytest.mark.slow
def test_the_timeline_says_who_holds_what(show):
    driver = show("small")
    wait(driver, "#timeline .layer")
    assert len(all_of(driver, "#timeline .layer")) == 7
    peak = driver.find_element(By.CSS_SELECTOR, "#timeline .peak")
    hover(driver, peak)
    text = tip(driver)
    assert text.startswith("73.3 MiB\nforward, losses")
    assert "head\n9.00 MiB" in text
    assert "peak 73.3 MiB, losses" in driver.find_element(By.ID, "timeline").text


@pytest.mark.slow
def test_dark_and_light(show):
    driver = show("small", theme="light")
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert driver.execute_script(colour) == "rgb(255, 255, 255)"
    driver.find_element(By.ID, "theme").click()
    dark = driver.execute_script(colour)
    assert dark != "rgb(255, 255, 255)"
    driver.find_element(By.ID, "theme").click()
    assert driver.execute_script(colour) == "rgb(255, 255, 255)"
    show("small", theme="dark")
    assert driver.execute_script(colour) == dark


@pytest.mark.slow
def test_a_partial_report_says_what_stopped_it(show):
    driver = show("partial")
    assert "CaptureError" in driver.find_element(By.CSS_SELECTOR, "[role=alert]").text
    assert [s.get_attribute("id") for s in all_of(driver, "section")] == ["pairs", "models"]


@pytest.mark.slow
def test_bars_of_nothing_have_no_length(show):
    report = samples.small()
    flops = replace(report.flops, total=0)
    driver = show("nothing", replace(report, flops=flops, plain=replace(report.plain, flops=0)))
    memory, operations = all_of(driver, ".compare")
    styles = [bar.get_attribute("style") for bar in operations.find_elements(By.TAG_NAME, "i")]
    assert styles == ["width: 0%;", "width: 0%;"]
    styles = [bar.get_attribute("style") for bar in memory.find_elements(By.TAG_NAME, "i")]
    assert styles[0] == "width: 100%;"


@pytest.mark.slow
def test_markup_in_names_is_text(show):
    driver = show("nasty")
    assert samples.NASTY in driver.find_element(By.TAG_NAME, "h1").text
    assert len(all_of(driver, "script")) == 3
    hover(driver, all_of(driver, ".block")[0])
    assert samples.NASTY in tip(driver)


@pytest.mark.slow
def test_numbers_are_written_as_in_the_terminal(show):
    driver = show("small")
    counts = [0, 7, 999, 1000, 1023, 1024, 999_499, 999_500, 10**9 - 1, 2**30 - 1, 2**44, 10**18]
    for rule in (figures.size, figures.amount, figures.operations):
        script = f"return arguments[0].map((count) => {rule.__name__}(count))"
        assert driver.execute_script(script, counts) == [rule(count) for count in counts]


def test_a_page_of_three_models_draws_two_and_names_them_all(show):
    small = samples.small()
    third = dataclasses.replace(small.towers[1], name="big")
    other = dataclasses.replace(small.pairs[0], name="big/again", teacher_model="big")
    report = dataclasses.replace(small, towers=(*small.towers, third), pairs=(*small.pairs, other))
    page = show("three", report)
    titles = [e.text for e in all_of(page, "h3")]
    assert {"Student, by block", "Teacher, by block"} <= set(titles)
    paths = [e.text for e in all_of(page, ".path")]
    assert any(f"big/{other.teacher}" in text for text in paths)
    assert all_of(page, ".block.student")
    assert all_of(page, ".block.teacher")
