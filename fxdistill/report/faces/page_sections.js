// The page from top to bottom: what a report does not know has no section.

const cell = (value, attributes = {}) => el("td", attributes, value);
const number = (value, attributes = {}) => el("td", { class: "number", ...attributes }, value);
const rowHead = (...children) => el("th", { scope: "row" }, ...children);
const sub = (text) => el("span", { class: "sub" }, text);

// `columns` are names; those that start with # hold numbers. `rows` are lists of cells.
function table(columns, rows, look = "") {
  const heads = columns.map((name) => {
    const kind = name.startsWith("#") ? "number" : null;
    return el("th", { scope: "col", class: kind }, name.replace(/^#/, ""));
  });
  const body = rows.map((cells) => (cells instanceof Element ? cells : el("tr", {}, cells)));
  return el("table", { class: look }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, body));
}

const told = (lines, look = "") =>
  el("ul", { class: `told ${look}` }, lines.map((line) => el("li", {}, line)));

function section(id, title, ...children) {
  const head = el("h2", { id: `${id}-title` }, title);
  return el("section", { id, "aria-labelledby": `${id}-title` }, head, ...children);
}

// ---- top

function head() {
  const names = SIDES.map((side) => towerOf(side)?.model).filter(Boolean);
  const arrow = () => el("span", { class: "arrow" }, " ← ");
  const title = names.flatMap((name, i) => (i ? [arrow(), name] : [name]));
  const versions = `fxdistill ${report.fxdistill}, torch ${report.torch}`;
  const how = [report.mode, report.backend].filter(Boolean).join(", ");
  const ranks = Object.entries(report.mesh).map(([name, size]) => `${name}=${size}`).join(", ");
  const made = ranks ? `${how}; one rank of ${ranks}` : how;
  const about = el("p", { class: "muted" }, `${versions}; ${made}`);
  return el("div", { class: "top" }, el("div", {}, el("h1", {}, title), about), themeButton());
}

function stopped() {
  if (report.stopped === null) return null;
  const title = el("h2", {}, "The report is partial");
  return el("div", { class: "stopped", role: "alert" }, title, el("p", {}, report.stopped));
}

function fact(name, value, beside, compare = null, wide = false) {
  const inside = [el("div", { class: "value" }, value)];
  if (compare) {
    const most = Math.max(...compare);
    const width = (count) => (most ? (100 * count) / most : 0);
    const bars = compare.map((count) => el("i", { style: `width: ${width(count)}%` }));
    inside.push(el("div", { class: "compare", "aria-hidden": "true" }, bars));
  }
  const lines = beside.map((line) => el("div", { class: "beside" }, line));
  return el("div", wide ? { class: "wide" } : {}, el("dt", {}, name), el("dd", {}, inside, lines));
}

function costFact(name, show, ours, plain) {
  if (plain === undefined) return fact(name, show(ours), [], null, true);
  const line = `${ratio(ours, plain)} plain training, ${show(plain)}`;
  return fact(name, show(ours), [line], [ours, plain], true);
}

function numbers() {
  const { memory, flops, plain, pairs, terms, warnings } = report;
  const groups = `in ${plural(folded.folds.length, "group")}, ${plural(terms.length, "term")}`;
  const below = warnings.length ? [el("a", { href: "#warnings" }, "listed below")] : [];
  const facts = [
    memory && costFact("Peak memory", size, memory.peak, plain?.peak),
    flops && costFact("FLOPs of a step", operations, flops.total, plain?.flops),
    fact("Pairs", String(pairs.length), [groups]),
    fact("Warnings", String(warnings.length), below),
  ];
  return el("dl", { class: "numbers" }, facts.filter(Boolean));
}

// ---- towers and pairs

function coverage() {
  const [ours, theirs] = SIDES.map((side, s) => {
    // Embedding, norm and head are parts of the model too, but no blocks.
    const { blocks } = towerOf(side);
    const repeated = blocks.filter((block) => block.kinds.length).length;
    const joined = [...new Set(folded.ends.map((ends) => ends[s]).filter((at) => at !== null))];
    const counted = joined.filter((at) => !repeated || blocks[at].kinds.length);
    return `${counted.length} of ${repeated || blocks.length} blocks`;
  });
  const outside = folded.ends.filter((ends) => ends.includes(null)).length;
  const rest = outside ? ` ${plural(outside, "pair")} in no block: listed below, not drawn.` : "";
  const pairs = plural(report.pairs.length, "pair");
  return `${pairs}: ${ours} of the student, ${theirs} of the teacher.${rest}`;
}

// Both paths; with the model's name in front, where it is none of the column's.
function endsOf(pair, { student, teacher }) {
  const named = (model, side, path) => (model === side ? path : `${model}/${path}`);
  const ours = named(pair.student_model, "student", student);
  return [ours, named(pair.teacher_model, "teacher", teacher)];
}

function pairRow(fold) {
  const pair = report.pairs[fold.members[0]];
  const [ours, theirs] = [valueText(pair.student_value), valueText(pair.teacher_value)];
  const both = ours === theirs ? ours : `${ours} ← ${theirs}`;
  const values = pair.student_value === null ? [] : [sub(both)];
  const between = pair.between ? [sub(pair.between)] : [];
  const moved = fold.numbers.some(([a, b]) => a !== b);
  const summary = el("summary", {}, "Which layers");
  const map = moved ? [el("details", {}, summary, layerMap(fold.numbers))] : [];
  const [student, teacher] = endsOf(pair, fold);
  const paths = el("span", { class: "path" }, student, el("br"), `← ${teacher}`);
  return [
    rowHead(paths, values, between, map),
    cell(pair.loss, { "data-column": "loss" }),
    number(String(pair.weight), { "data-column": "weight" }),
    number(String(fold.members.length), { "data-column": "pairs" }),
  ];
}

function towersSection() {
  const drawable = SIDES.every((side) => towerOf(side)?.blocks.length);
  const { pairs, terms } = report;
  if (!drawable && !pairs.length && !terms.length) return null;
  const figure = drawable ? [el("p", { class: "muted" }, coverage()), ...towersFigure()] : [];
  const columns = ["student ← teacher", "loss", "#weight", "#pairs"];
  const list = pairs.length ? table(columns, folded.folds.map(pairRow), "full stack") : null;
  const none = el("p", { class: "muted" }, "No pairs: nothing is matched but logits and labels.");
  const weight = (term) => number(String(term.weight));
  const rows = terms.map((term) => [rowHead(term.name), cell(term.loss), weight(term)]);
  const title = el("h3", {}, "Terms of the total");
  const total = terms.length ? [title, table(["term", "loss", "#weight"], rows)] : [];
  return section("pairs", "Towers and pairs", figure, el("h3", {}, "Pairs"), list ?? none, total);
}

// ---- costs

function memorySection() {
  const { memory } = report;
  if (memory === null) return null;
  const { plain } = report;
  const line = (name, count, about, alone) => [
    rowHead(name, about ? sub(about) : null),
    number(size(count)),
    ...(plain ? [number(alone === undefined ? "" : size(alone))] : []),
  ];
  const parts = [
    ...Object.entries(memory.weights).map(([tower, count]) => line(`weights, ${tower}`, count)),
    line("gradients", memory.gradients, "at the end", plain?.gradients),
    line("saved", memory.saved, "what the forward leaves for the backward", plain?.saved),
    line("transient", memory.transient, "at the peak: nothing of the above", plain?.transient),
    line("taps", memory.taps, "matched values, the most at one moment"),
    line("head", memory.head, "logits, or what is held for them, at most", plain?.head),
    el("tr", { class: "total" }, line("peak", memory.peak, `at ${memory.peak_at}`, plain?.peak)),
  ];
  const optimizers = Object.entries(memory.optimizers).map(([name, states]) => [
    rowHead(name),
    number(size(states)),
    number(size(memory.peak + states)),
  ]);
  const about = "What is allocated from operator to operator. The axis counts operators, not time.";
  const chart = [el("p", { class: "muted" }, about), drawn(drawTimeline)];
  const columns = ["optimizer", "#states", "#peak with them"];
  const states = [el("h3", {}, "With an optimizer"), table(columns, optimizers)];
  const left = el("div", {}, el("h3", {}, "Parts"), table(["part", "#bytes", ...(plain ? ["#labels alone"] : [])], parts));
  const right = el("div", {}, optimizers.length ? states : []);
  const tables = el("div", { class: "side-by-side" }, left, right);
  return section("memory", "Memory", memory.timeline.length ? chart : null, tables);
}

function flopsSection() {
  const { flops } = report;
  if (flops === null) return null;
  const row = ([name, count]) => [
    rowHead(swatch(name), name),
    number(operations(count)),
    number(share(count, flops.total)),
  ];
  const whole = [rowHead("total"), number(operations(flops.total)), number("")];
  const rows = [...partsOf(flops).map(row), el("tr", { class: "total" }, whole)];
  const list = table(["for", "#FLOPs", "#share"], rows);
  const sides = SIDES.filter((side) => towerOf(side)?.blocks.length);
  const left = el("div", {}, el("h3", {}, "By purpose"), list);
  const bars = el("div", {}, sides.flatMap(barsOf));
  const tables = el("div", { class: "side-by-side" }, left, bars);
  return section("flops", "FLOPs", drawn(drawFlops), tables);
}

// ---- models, passes, and what else is known

function modelsSection() {
  const rows = report.towers.map((tower) => [
    rowHead(tower.name, sub(`${tower.model}${tower.training ? "" : ", eval"}`)),
    number(amount(tower.parameters), { "data-column": "parameters" }),
    number(tower.trainable ? amount(tower.trainable) : "frozen", { "data-column": "trained" }),
    number(size(tower.bytes), { "data-column": "bytes" }),
    cell(tower.dtypes.map(short).join(", "), { "data-column": "dtypes" }),
  ]);
  const given = Object.entries(report.inputs);
  const inputs = given.map(([name, value]) => [rowHead(name), cell(valueText(value))]);
  const list = table(["model", "#parameters", "#trained", "#bytes", "dtypes"], rows, "full stack");
  const values = [el("h3", {}, "Inputs"), table(["name", "value"], inputs)];
  return section("models", "Models", list, given.length ? values : null);
}

function change(values, show, column) {
  if (values === null) return number("", { "data-column": null });
  const { before, after } = values;
  const text = before === after ? show(after) : [`${show(before)} `, el("br"), `→ ${show(after)}`];
  return number(text, { "data-column": column });
}

function passRow(line, at) {
  const { exposed, remarks } = line;
  const shown = `${plural(exposed.length, "output")} exposed: ${folded.exposed[at].join(", ")}`;
  const said = [...(exposed.length ? [shown] : []), ...remarks];
  const rest = said.length || line.changed ? said : ["nothing to do"];
  return [
    rowHead(line.name, rest.map(sub)),
    cell(line.graph, { class: "short", "data-column": "graph" }),
    change(line.nodes, String, "nodes"),
    change(line.flops, operations, "FLOPs"),
    change(line.bytes, size, "bytes"),
    number((line.seconds * 1e3).toFixed(0), { "data-column": "ms" }),
  ];
}

function passesSection() {
  const { passes, nodes } = report;
  const counts = Object.entries(nodes).map(([name, count]) => `${name} ${count}`).join(", ");
  if (!passes.length && !counts) return null;
  const columns = ["pass", "graph", "#nodes", "#FLOPs", "#bytes", "#ms"];
  const list = passes.length ? table(columns, passes.map(passRow), "full stack") : null;
  const about = counts ? el("p", { class: "muted" }, `One graph; its nodes: ${counts}.`) : null;
  return section("passes", "Passes", about, list);
}

function ranksSection() {
  if (!report.collectives.length) return null;
  const rows = report.collectives.map((one) => [
    rowHead(one.owner),
    cell(one.kind, { class: "path" }),
    number(String(one.times)),
    number(size(one.bytes)),
  ]);
  const columns = ["of", "collective", "#times", "#bytes"];
  return section("ranks", "Between ranks", table(columns, rows));
}

function eventsSection() {
  const { casts, events } = report;
  if (!casts.length && !events.length) return null;
  const lines = events.map((event) => [el("b", {}, event.kind), " ", event.reason]);
  const happened = lines.length ? told(lines) : null;
  const changed = casts.map((cast) => [
    rowHead(cast.owner),
    cell(`${short(cast.before)} → ${short(cast.after)}`),
    number(String(cast.times)),
  ]);
  const list = [el("h3", {}, "Casts"), table(["in", "cast", "#times"], changed)];
  return section("events", "Events and casts", happened, casts.length ? list : null);
}

const listSection = (id, title, lines) =>
  lines.length ? section(id, title, told(lines, id)) : null;

const sections = [
  listSection("warnings", "Warnings", report.warnings),
  towersSection(),
  memorySection(),
  flopsSection(),
  modelsSection(),
  passesSection(),
  ranksSection(),
  eventsSection(),
  listSection("notes", "Notes", report.notes),
].filter(Boolean);

const links = sections.map((one) => el("a", { href: `#${one.id}` }, one.firstChild.textContent));
document.getElementById("head").append(
  ...[head(), el("nav", { "aria-label": "Sections" }, links), stopped(), numbers()].filter(Boolean),
);
document.getElementById("main").replaceChildren(...sections);
const about = `Schema ${report.schema}. The report is in this file as JSON.`;
document.getElementById("foot").append(about);
