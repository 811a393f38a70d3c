// Both towers, the student's on the left, and the pairs drawn between their blocks.

const SIDES = folded.sides; // the models that are drawn: who learns, and from whom
const roleOf = (side) => (side === SIDES[0] ? "student" : "teacher");
const titleOf = (side) => side.charAt(0).toUpperCase() + side.slice(1);
const FOLD_FROM = 17; // a tower of fewer blocks is shown whole
const HEIGHTS = { run: 46, open: 24, block: 32, plain: 26 };
const GAP = 6;

const towerOf = (name) => report.towers.find((tower) => tower.name === name);

// The last segment of a path, with the one before it where it is but a number.
function label(path) {
  const segments = path.split(".");
  const inside = path.match(/[^.]+\.\{[^}]*\}$/);
  if (inside) return inside[0];
  return /^\d+$/.test(segments.at(-1)) ? segments.slice(-2).join(".") : segments.at(-1);
}

function layerMap(numbers) {
  const spans = numbers.map(([ours, theirs]) => el("span", {}, `${ours}←${theirs}`));
  return el("div", { class: "map" }, spans);
}

function roleAnd(role, value) {
  return role ? `${role}, ${value}` : value;
}

function pairTip(members) {
  const pair = report.pairs[members[0]];
  const fold = folded.folds.find((one) => one.members.includes(members[0]));
  const whole = members.length > 1 && members.length === fold.members.length;
  const [ours, theirs] = endsOf(pair, whole ? fold : pair);
  const rest = members.length > 1 && !whole ? ` and ${members.length - 1} like it` : "";
  const entries = [
    ["student", roleAnd(pair.student_role, valueText(pair.student_value))],
    ["teacher", roleAnd(pair.teacher_role, valueText(pair.teacher_value))],
    ["loss", pair.loss],
    ["weight", String(pair.weight)],
    ...(pair.between ? [["between", pair.between]] : []),
    ...(members.length > 1 ? [["pairs", String(members.length)]] : []),
  ];
  const map = whole && fold.numbers.length ? [layerMap(fold.numbers)] : [];
  return [el("b", {}, ours), el("div", {}, `← ${theirs}${rest}`), definitions(entries), ...map];
}

function blockTip(side, item, joined) {
  const blocks = towerOf(side).blocks.slice(item.first, item.first + item.count);
  const path = item.count > 1 ? item.row.label : blocks[0].path || item.row.label;
  const total = (field) => sum(blocks.map((block) => block[field]));
  const kinds = blocks[0].kinds.map(([, kind]) => kind).join(", ");
  const entries = [
    ...(item.count > 1 ? [["blocks", String(item.count)]] : []),
    ...(kinds ? [["holds", kinds]] : []),
    ["parameters", amount(total("parameters"))],
    ...(report.flops ? [["forward", operations(total("forward"))]] : []),
    ...(report.flops && total("backward") ? [["backward", operations(total("backward"))]] : []),
    ["pairs", String(joined)],
  ];
  return [el("b", {}, path), el("div", { class: "muted" }, side), definitions(entries)];
}

// ---- which rows there are, and where

// The rows of a tower from top to bottom; an open run has a row of its own above its blocks.
function itemsOf(side, open) {
  const tower = towerOf(side);
  return folded.rows[side].flatMap((row, at) => {
    const make = (kind, first, count) => ({ side, row, at, kind, first, count, pairs: [] });
    const kindOf = (index) => (tower.blocks[index].kinds.length ? "block" : "plain");
    if (row.count === 1) return [make(kindOf(row.first), row.first, 1)];
    if (!open.has(at)) return [make("run", row.first, row.count)];
    const inside = Array.from({ length: row.count }, (_, i) => row.first + i);
    return [make("open", row.first, row.count), ...inside.map((i) => make(kindOf(i), i, 1))];
  });
}

// Both towers are as tall as the taller one: the other's rows are set farther apart, but for the
// first block of an open run, which stays with its heading.
function place(columns) {
  const heightOf = (items) =>
    sum(items.map((item) => HEIGHTS[item.kind])) + GAP * (items.length - 1);
  const height = Math.max(...columns.map(heightOf));
  for (const items of columns) {
    const spaces = items.slice(0, -1).filter((item) => item.kind !== "open").length;
    const extra = (height - heightOf(items)) / Math.max(1, spaces);
    let y = 0;
    for (const item of items) {
      item.y = y;
      item.h = HEIGHTS[item.kind];
      y += item.h + GAP + (item.kind === "open" ? 0 : extra);
    }
  }
  return height;
}

const holds = (item, block) =>
  item.kind !== "open" && item.first <= block && block < item.first + item.count;

// A curve for each folded pair and each two rows that it joins.
function bundles(columns) {
  const found = new Map();
  folded.folds.forEach((fold, f) => {
    for (const index of fold.members) {
      const ends = folded.ends[index];
      if (ends.includes(null)) continue;
      const items = columns.map((column, s) => column.find((item) => holds(item, ends[s])));
      const key = `${f} ${items.map((item) => item.first)}`;
      if (!found.has(key)) found.set(key, { items, members: [] });
      found.get(key).members.push(index);
    }
  });
  for (const bundle of found.values()) {
    for (const item of bundle.items) item.pairs.push(bundle);
  }
  return [...found.values()];
}

// Where on its row a pair ends: at the height of the mixer or MLP it reads, in their order.
function heightOf(bundle, s) {
  const item = bundle.items[s];
  const pair = report.pairs[bundle.members[0]];
  const path = (s === 0 ? pair.student : pair.teacher).split(/[:@]/)[0];
  const kinds = towerOf(SIDES[s]).blocks[folded.ends[bundle.members[0]][s]].kinds;
  const at = kinds.findIndex(([where]) => `${path}.`.startsWith(`${where}.`));
  const part = at < 0 ? 0.5 : (at + 1) / (kinds.length + 1);
  return item.y + item.h * part;
}

// ---- drawing

function drawBlock(item, x, width, matched) {
  const { kind, side, row } = item;
  const runs = kind === "run" || kind === "open";
  const tower = towerOf(side);
  const block = tower.blocks[item.first];
  const name = runs ? row.label : block.path;
  const group = svg("g", {
    class: `block ${kind === "plain" ? "" : kind} ${runs ? "run" : ""} ${roleOf(side)}`,
    transform: `translate(${x} ${item.y})`,
    role: runs ? "button" : "img",
    "aria-expanded": runs ? String(kind === "open") : null,
    "aria-label": `${side} ${name}${runs ? `, ${row.count} blocks` : ""}`,
    tabindex: "-1",
  });
  group.append(svg("rect", { class: "box", width, height: item.h, rx: 4 }));
  const edge = { y: 0, width: 3, height: item.h, fill: `var(--${roleOf(side)})` };
  const facing = roleOf(side) === "student" ? width - 3 : 0;
  if (kind !== "open") group.append(svg("rect", { ...edge, x: facing }));
  const middle = kind === "run" ? 16 : item.h / 2;
  const left = roleOf(side) === "student" ? 12 : 14;
  const arrow = runs ? (kind === "open" ? "▾ " : "▸ ") : "";
  const look = { x: left, y: middle, "dominant-baseline": "central" };
  const title = svg("text", look, arrow + label(name));
  group.append(title);
  if (kind === "run") group.append(strip(item, left, width - 26, matched));
  item.finish = () => finishBlock(item, group, title, width, middle);
  return group;
}

// What needs the text's length: the rest of the line, where there is room for it.
function finishBlock(item, group, title, width, middle) {
  fit(title, width - 24);
  const left = Number(title.getAttribute("x")) + title.getComputedTextLength() + 10;
  const block = towerOf(item.side).blocks[item.first];
  const kinds = block.kinds.map(([, kind]) => kind).join(" · ");
  if (item.kind === "open") return;
  const many = item.count > 1;
  const right = amount(many ? item.row.parameters : block.parameters);
  const place = { y: middle, class: "muted small", "dominant-baseline": "central" };
  const number = svg("text", { ...place, x: width - 13, "text-anchor": "end" }, right);
  group.append(number);
  let room = width - 13 - left;
  if (room < number.getComputedTextLength()) number.remove();
  else room -= number.getComputedTextLength() + 10;
  const more = svg("text", { ...place, x: left }, many ? `×${item.count}  ${kinds}` : kinds);
  group.append(more);
  if (room < more.getComputedTextLength()) more.textContent = many ? `×${item.count}` : "";
  if (room < more.getComputedTextLength()) more.remove();
}

// A cell for each block of a folded run; those with pairs are filled.
function strip(item, x, width, matched) {
  const each = width / item.count;
  const gap = each > 3 ? 1 : 0;
  const cells = Array.from({ length: item.count }, (_, i) =>
    svg("rect", {
      x: x + i * each,
      y: 31,
      width: each - gap,
      height: 7,
      fill: matched.has(item.first + i) ? `var(--${roleOf(item.side)})` : "var(--line)",
    }),
  );
  return svg("g", { class: "strip", "aria-hidden": "true" }, cells);
}

function drawPair(bundle, left, right) {
  const [from, to] = [heightOf(bundle, 0), heightOf(bundle, 1)];
  const bend = (right - left) * 0.45;
  const d = `M${left} ${from}C${left + bend} ${from} ${right - bend} ${to} ${right} ${to}`;
  const count = bundle.members.length;
  const thick = count > 1 ? Math.min(5, 1.5 + Math.log2(count) / 2) : 1.5;
  const pair = report.pairs[bundle.members[0]];
  const rest = count > 1 ? `, and ${count - 1} like it` : "";
  const group = svg(
    "g",
    {
      class: "pair",
      role: "img",
      tabindex: "-1",
      style: `--thick: ${thick + 1.5}px`,
      "aria-label": `${pair.student} ← ${pair.teacher}, ${pair.loss}${rest}`,
    },
    svg("path", { class: "hit", d }),
    svg("path", { class: "seen", d, "stroke-width": thick }),
    svg("circle", { cx: left, cy: from, r: 3 }),
    svg("circle", { cx: right, cy: to, r: 3 }),
  );
  if (count > 1) {
    const middle = { x: (left + right) / 2, y: (from + to) / 2 };
    const look = { "text-anchor": "middle", "dominant-baseline": "central" };
    group.append(svg("text", { ...middle, ...look }, `×${count}`));
  }
  bundle.y = Math.min(from, to);
  return group;
}

// ---- one tab stop for the whole figure; arrows move within a column, and from one to the next

const STEPS = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowRight: [1, 0], ArrowLeft: [-1, 0] };

function steer(columns, toggle) {
  const sorted = columns.map((column) => [...column].sort((a, b) => a.y - b.y));
  const nodes = sorted.map((column) => column.map((item) => item.node));
  const reach = (node) => {
    nodes.flat().forEach((one) => one.setAttribute("tabindex", one === node ? "0" : "-1"));
  };
  reach(nodes.find((column) => column.length)?.[0]);
  sorted.forEach((column, c) =>
    column.forEach((item, i) => {
      item.node.addEventListener("keydown", (event) => {
        const press = event.key === "Enter" || event.key === " ";
        if (!STEPS[event.key] && !press) return;
        event.preventDefault();
        if (press) return toggle(item);
        const [across, down] = STEPS[event.key];
        const beside = sorted[c + across] ?? [];
        const near = [...beside].sort((a, b) => Math.abs(a.y - item.y) - Math.abs(b.y - item.y));
        const next = down ? column[i + down] : near[0];
        if (!next) return;
        reach(next.node);
        next.node.focus();
      });
    }),
  );
}

function drawTowers(figure, width, open, change) {
  const columns = SIDES.map((side) => itemsOf(side, open[side]));
  const height = place(columns);
  const joined = bundles(columns);
  const column = Math.min(360, Math.max(width * 0.37, 120));
  const xs = [0, width - column];
  const matched = SIDES.map((_, s) => new Set(folded.ends.map((ends) => ends[s])));
  const top = 30;
  const look = { role: "group", "aria-label": "Towers and pairs" };
  const root = svg("svg", { ...look, viewBox: `0 0 ${width} ${height + top + 4}` });
  const body = svg("g", { transform: `translate(0 ${top})` });
  SIDES.forEach((side, s) => {
    const title = titleOf(side);
    root.append(svg("text", { x: xs[s], y: 14, "font-weight": 650 }, title));
  });
  for (const bundle of joined) bundle.node = drawPair(bundle, column + 4, xs[1] - 4);
  columns.forEach((items, s) => {
    for (const item of items) item.node = drawBlock(item, xs[s], column, matched[s]);
  });
  body.append(...[...joined, ...columns.flat()].map((item) => item.node));
  root.append(body);
  figure.replaceChildren(root);
  columns.flat().forEach((item) => item.finish());
  const light = (nodes) => (on) => {
    root.classList.toggle("lit", on);
    nodes.forEach((node) => node.classList.toggle("on", on));
  };
  for (const bundle of joined) {
    const ends = bundle.items.map((item) => item.node);
    explain(bundle.node, () => pairTip(bundle.members), light([bundle.node, ...ends]));
  }
  const toggle = (item) => {
    if (item.kind !== "run" && item.kind !== "open") return;
    const set = open[item.side];
    if (!set.delete(item.at)) set.add(item.at);
    hideTip();
    change(item);
  };
  for (const item of columns.flat()) {
    const others = item.pairs.flatMap((one) => [one.node, ...one.items.map((end) => end.node)]);
    const count = sum(item.pairs.map((one) => one.members.length));
    const tell = () => blockTip(item.side, item, count);
    explain(item.node, tell, light([item.node, ...others]));
    item.node.addEventListener("click", () => toggle(item)); // which draws anew, with no tooltip
  }
  steer([columns[0], joined, columns[1]], toggle);
}

function towersFigure() {
  const runs = (side) => folded.rows[side].flatMap((row, at) => (row.count > 1 ? [at] : []));
  const all = (side) => new Set(runs(side));
  const few = (side) => towerOf(side).blocks.length < FOLD_FROM;
  const open = Object.fromEntries(SIDES.map((side) => [side, few(side) ? all(side) : new Set()]));
  let size = 0;
  const redraw = (item) => {
    drawTowers(figure, size, open, redraw);
    if (!item) return;
    const drawn = figure.querySelectorAll(`.block.run.${roleOf(item.side)}`);
    drawn[runs(item.side).indexOf(item.at)].focus({ preventScroll: true });
  };
  const figure = drawn((_, width) => {
    size = width;
    redraw();
  });
  const set = (whole) => () => {
    for (const side of SIDES) open[side] = whole ? all(side) : new Set();
    redraw();
  };
  const unfold = el("button", { type: "button", id: "unfold" }, "Unfold all");
  const fold = el("button", { type: "button", id: "fold" }, "Fold all");
  unfold.addEventListener("click", set(true));
  fold.addEventListener("click", set(false));
  const foldable = SIDES.some((side) => runs(side).length);
  return [...(foldable ? [el("div", { class: "controls" }, unfold, fold)] : []), figure];
}
