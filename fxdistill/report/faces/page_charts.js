// Memory over a step, and what operations are for.

const OWNERS = ["weights", "gradients", "student", "teacher", "taps", "head", "losses"];
const COSTS = ["teacher", "forward", "backward", "losses", "projections", "again"];
const KNOWN = new Set([...OWNERS, ...COSTS]);
const colour = (name) => `var(--${KNOWN.has(name) ? name : "other"})`;
const swatch = (name) => el("span", { class: "swatch", style: `background: ${colour(name)}` });

// ---- memory

// All owners that hold anything, the known ones first, each in the place where it is stacked.
function ownersOf(timeline) {
  const held = timeline.flatMap((moment) => Object.keys(moment.held));
  const names = [...new Set([...OWNERS, ...held])];
  return names.filter((name) => timeline.some((moment) => moment.held[name] > 0));
}

const totalOf = (moment) => sum(Object.values(moment.held));

// Steps for an axis: 1, 2, 4 or 8 of a binary unit, about four of them.
function ticks(most) {
  let step = 1;
  while (most / step > 5) step *= 2;
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

function layers(timeline, owners, x, y) {
  const below = timeline.map(() => 0);
  return owners.map((owner) => {
    const floor = [...below];
    timeline.forEach((moment, i) => (below[i] += moment.held[owner] ?? 0));
    const upper = timeline.map((_, i) => `V${y(below[i])}H${x(i + 1)}`).join("");
    const lower = timeline.map((_, i) => `V${y(floor[i])}H${x(i)}`).reverse().join("");
    const d = `M${x(0)} ${y(floor[0])}${upper}${lower}Z`;
    return svg("path", { class: "layer", fill: colour(owner), d });
  });
}

function momentTip(moment, owners) {
  const entries = owners
    .filter((owner) => moment.held[owner])
    .reverse()
    .map((owner) => [el("span", {}, swatch(owner), owner), size(moment.held[owner])]);
  const head = [el("b", {}, size(totalOf(moment))), el("div", {}, `${moment.phase}, ${moment.at}`)];
  return [...head, definitions(entries, true)];
}

function drawTimeline(figure, width) {
  const { timeline, peak_at: peakAt } = report.memory;
  const owners = ownersOf(timeline);
  const totals = timeline.map(totalOf);
  const most = Math.max(...totals);
  const worst = totals.indexOf(most);
  const height = width < 500 ? 260 : 320;
  const box = { left: width < 500 ? 58 : 68, right: width - 1, top: 34, bottom: height - 26 };
  const round = (number) => Math.round(number * 10) / 10;
  const x = (i) => round(box.left + ((box.right - box.left) * i) / timeline.length);
  const y = (bytes) => round(box.bottom - ((box.bottom - box.top) * bytes) / most);
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    id: "timeline",
    tabindex: "0",
    role: "slider",
    "aria-label": "Memory over the step",
    "aria-valuemin": 0,
    "aria-valuemax": timeline.length - 1,
  });
  for (const bytes of ticks(most)) {
    const at = { x: box.left - 8, y: y(bytes), "text-anchor": "end", class: "muted small" };
    const line = { class: "axis", x1: box.left, x2: box.right, y1: y(bytes), y2: y(bytes) };
    const text = svg("text", { ...at, "dominant-baseline": "central" }, size(bytes));
    root.append(text, svg("line", line));
  }
  root.append(...layers(timeline, owners, x, y), ...phases(timeline, x, box));
  const middle = (x(worst) + x(worst + 1)) / 2;
  root.append(...peakMark(`peak ${size(most)}, ${peakAt}`, middle, y(most), box));
  const cursor = svg("line", { class: "mark", y1: box.top, y2: box.bottom, visibility: "hidden" });
  root.append(cursor);
  figure.replaceChildren(root, legend(owners, timeline[worst]));
  for (const text of root.querySelectorAll("text.fits")) fit(text, box.right - box.left);
  follow(root, cursor, { timeline, owners, worst, x, box });
}

// Where forward and backward are.
function phases(timeline, x, box) {
  const turn = timeline.findIndex((moment) => moment.phase === "backward");
  const look = { y: box.bottom + 17, class: "muted small" };
  const parts = turn < 0 ? [["forward", 0]] : [["forward", 0], ["backward", turn]];
  const names = parts.map(([name, i]) => svg("text", { ...look, x: x(i) + (i ? 6 : 0) }, name));
  if (turn <= 0) return names;
  const line = { x1: x(turn), x2: x(turn), y1: box.top, y2: box.bottom + 22, class: "boundary" };
  return [svg("line", line), ...names];
}

function peakMark(text, x, y, box) {
  const part = (x - box.left) / (box.right - box.left);
  const anchor = part < 0.3 ? "start" : part > 0.7 ? "end" : "middle";
  const at = { start: box.left, middle: x, end: box.right }[anchor];
  const look = { y: 12, "text-anchor": anchor, "font-weight": 650, class: "fits" };
  return [
    svg("line", { class: "mark", x1: x, x2: x, y1: 20, y2: y }),
    svg("circle", { class: "peak", cx: x, cy: y, r: 4 }),
    svg("text", { ...look, x: at }, text),
  ];
}

function legend(owners, moment) {
  const items = owners.map((owner) => {
    const held = size(moment.held[owner] ?? 0);
    return el("li", {}, swatch(owner), `${owner} ${held}`);
  });
  return el("ul", { class: "legend" }, el("li", {}, "At the peak:"), items);
}

// The moment under the pointer, or the one that arrow keys went to.
function follow(root, cursor, { timeline, owners, worst, x, box }) {
  let at = worst;
  const light = (on) => cursor.setAttribute("visibility", on ? "visible" : "hidden");
  const show = (i, place) => {
    at = Math.max(0, Math.min(timeline.length - 1, i));
    const middle = (x(at) + x(at + 1)) / 2;
    cursor.setAttribute("x1", middle);
    cursor.setAttribute("x2", middle);
    const moment = timeline[at];
    root.setAttribute("aria-valuenow", at);
    root.setAttribute("aria-valuetext", `${moment.phase}, ${moment.at}: ${size(totalOf(moment))}`);
    const onLine = () => {
      const frame = root.getBoundingClientRect();
      return [frame.left + middle, frame.top + box.top];
    };
    showTip(momentTip(moment, owners), place ?? onLine, light);
  };
  root.setAttribute("aria-valuenow", worst);
  const under = (event) => {
    const left = event.clientX - root.getBoundingClientRect().left - box.left;
    return Math.floor((left / (box.right - box.left)) * timeline.length);
  };
  root.addEventListener("pointermove", (event) => {
    if (!rests(event)) show(under(event), [event.clientX, event.clientY]);
  });
  root.addEventListener("click", (event) => event.pointerType === "touch" && show(under(event)));
  root.addEventListener("pointerleave", leave);
  root.addEventListener("focus", () => root.matches(":focus-visible") && show(at));
  root.addEventListener("blur", hideTip);
  root.addEventListener("keydown", (event) => {
    const far = Math.ceil(timeline.length / 10);
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - far, PageDown: at + far };
    const next = { ...steps, Home: 0, End: timeline.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
}

// ---- operations

const partsOf = (flops) =>
  COSTS.map((name) => [name, flops[name]]).filter(([, count]) => count > 0);

function drawFlops(figure, width) {
  const parts = partsOf(report.flops);
  const whole = sum(parts.map(([, count]) => count));
  const look = { role: "img", "aria-label": "FLOPs of a step by purpose" };
  const root = svg("svg", { ...look, viewBox: `0 0 ${width} 34` });
  let left = 0;
  for (const [name, count] of parts) {
    const length = (width * count) / whole;
    const shape = { x: left, y: 0, width: Math.max(1, length - 2), height: 34, fill: colour(name) };
    const bar = svg("rect", { ...shape, class: "cost" });
    const told = `${operations(count)}, ${share(count, whole)}`;
    explain(bar, () => [el("b", {}, name), el("div", {}, told)]);
    root.append(bar);
    left += length;
  }
  figure.replaceChildren(root);
}

function track(forward, backward, most) {
  const style = (name, count) => `width: ${(100 * count) / most}%; background: ${colour(name)}`;
  const bar = (name, count) => (count ? [el("i", { style: style(name, count) })] : []);
  return el("div", { class: "track" }, bar(...forward), bar(...backward));
}

// Forward and backward of each row of blocks, both towers to one scale.
function blockBars(side, most, entries) {
  const first = roleOf(side) === "teacher" ? "teacher" : "forward";
  return entries.flatMap(({ name, forward, backward }) => [
    el("div", { class: "path" }, name),
    track([first, forward], ["backward", backward], most),
    el("div", { class: "number" }, operations(forward + backward)),
  ]);
}

function barsOf(side) {
  const tower = towerOf(side);
  const rows = folded.rows[side].map((row) => ({
    ...row,
    name: `${label(row.label)}${row.count > 1 ? ` ×${row.count}` : ""}`,
  }));
  const costs = (entry) => entry.forward + entry.backward;
  const most = Math.max(1, ...SIDES.flatMap((one) => (folded.rows[one] ?? []).map(costs)));
  const blocks = tower.blocks.map((block) => ({ ...block, name: label(block.path) }));
  const single = Math.max(1, ...blocks.map(costs));
  const each = el(
    "details",
    {},
    el("summary", {}, `Each of ${blocks.length} parts`),
    el("div", { class: "bars" }, blockBars(side, single, blocks)),
  );
  const head = el("h3", {}, `${titleOf(side)}, by block`);
  const bars = el("div", { class: "bars" }, blockBars(side, most, rows));
  return [head, bars, ...(rows.length < blocks.length ? [each] : [])];
}
