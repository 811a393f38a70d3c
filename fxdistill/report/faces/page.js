// The report, numbers as people read them, elements, the tooltip, and the theme.

const report = JSON.parse(document.getElementById("report").textContent);
const folded = JSON.parse(document.getElementById("folded").textContent);

// ---- numbers: the rules of fxdistill/base/figures.py

function scaled(count, base, units) {
  let number = count;
  let unit = 0;
  while (Math.abs(number) >= base - 0.5 && unit < units.length - 1) {
    number /= base;
    unit += 1;
  }
  if (unit === 0) return `${count} ${units[0]}`.trim();
  const digits = Math.abs(number) < 9.995 ? 2 : Math.abs(number) < 99.95 ? 1 : 0;
  return `${number.toFixed(digits)} ${units[unit]}`;
}

const size = (count) => scaled(count, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
const amount = (count) => scaled(count, 1000, ["", "k", "M", "B", "T"]);
const operations = (count) =>
  scaled(count, 1000, ["", "k", "M", "G", "T", "P", "E"].map((prefix) => `${prefix}FLOP`));
const ratio = (ours, theirs) => (theirs ? `${(ours / theirs).toFixed(2)} ×` : "–");
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function share(part, whole) {
  if (!whole) return "–";
  const percent = (100 * part) / whole;
  return percent > 0 && percent < 1 ? "<1 %" : `${percent.toFixed(0)} %`;
}

const short = (dtype) => dtype.replace(/^torch\./, "");

function valueText(value) {
  if (value === null) return "not known: the step was not captured";
  const placed = value.placements.length ? ` ${value.placements.join(", ")}` : "";
  return `[${value.shape.join(", ")}] ${short(value.dtype)}${placed}`;
}

// ---- elements: children that are strings become text, so nothing in a report is markup

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Cuts a drawn text to a width in pixels; what is whole stands in the tooltip.
function fit(text, width) {
  let left = text.textContent;
  while (left.length > 1 && text.getComputedTextLength() > width) {
    left = left.slice(0, -1);
    text.textContent = `${left.trimEnd()}…`;
  }
}

function definitions(entries, numbers = false) {
  const cells = entries.flatMap(([name, value]) => [
    el("dt", {}, name),
    el("dd", numbers ? { class: "number" } : {}, value),
  ]);
  return el("dl", {}, cells);
}

// ---- the tooltip: by pointer, by keyboard and by touch, gone on Escape

const tip = document.getElementById("tip");
let anchor = null; // says where that is now which the keyboard or a finger chose
let shownAt = 0; // how far the page was scrolled then
let lit = null; // takes the marks away of what is explained now

function placeTip([x, y]) {
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth - 8 ? x - 16 - width : x + 16;
  const top = y + 16 + height > innerHeight - 8 ? y - 16 - height : y + 16;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - 8 - width))}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

// `at` is a place in the window, or a function that gives it: then the tooltip stays on scrolling.
// `light(on)` marks what belongs together, and takes the marks away.
function showTip(content, at, light) {
  if (lit !== light) lit?.(false);
  lit = light;
  light(true);
  tip.replaceChildren(...content);
  tip.hidden = false;
  shownAt = scrollY;
  anchor = typeof at === "function" ? at : null;
  placeTip(anchor ? anchor() : at);
}

function hideTip() {
  tip.hidden = true;
  anchor = null;
  lit?.(false);
  lit = null;
}

// Scrolling moves things below a pointer that rests: what was chosen stays.
const rests = (event) => anchor && !event.movementX && !event.movementY;
const leave = () => anchor || hideTip();

// `content()` makes what is shown.
function explain(node, content, light = () => {}) {
  node.addEventListener("pointermove", (event) => {
    if (!rests(event)) showTip(content(), [event.clientX, event.clientY], light);
  });
  const middle = () => {
    const box = node.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const stay = () => showTip(content(), middle, light);
  node.addEventListener("focus", () => node.matches(":focus-visible") && stay());
  node.addEventListener("click", (event) => event.pointerType === "touch" && stay());
  node.addEventListener("pointerleave", leave);
  node.addEventListener("blur", hideTip);
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
addEventListener("scroll", () => {
  if (anchor) placeTip(anchor());
  else if (scrollY !== shownAt) hideTip(); // what is under the pointer has moved on
});

// Draws a figure again where its width changes.
function drawn(draw) {
  const figure = el("figure");
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(figure.clientWidth - width) < 1) return;
    width = figure.clientWidth;
    draw(figure, width);
  }).observe(figure);
  return figure;
}

// ---- light and dark

function themeButton() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = document.documentElement.dataset;
  const isDark = () => (chosen.theme ? chosen.theme === "dark" : system.matches);
  const button = el("button", { type: "button", id: "theme" });
  const tell = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    chosen.theme = isDark() ? "light" : "dark";
    tell();
  });
  system.addEventListener("change", tell);
  tell();
  return button;
}
