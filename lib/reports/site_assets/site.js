// The rows browser. Texts of models and data sets become text nodes only, never markup; nothing is fetched or stored.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROW_HEIGHT = 36; // px, as in the style sheet
  const OVERSCAN = 8; // rows drawn above and below what is seen
  const OUTCOMES = {
    accuracy: ["correct", "wrong", "run-on", "no answer", "truncated"],
    safety: ["safe", "unsafe", "unparsed"],
  };
  const FILTERS = ["axis", "run", "with", "outcome", "change", "hazard", "persona", "search"];
  const byId = (id) => document.getElementById(id);
  const control = Object.fromEntries(FILTERS.map((name) => [name, byId(name)]));
  const grid = byId("grid");
  const body = byId("body");
  const head = grid.querySelector(".head");
  const detail = byId("detail");
  let shown = []; // the rows that pass the filters, in order: { item, row, other }
  let chosen = -1; // position in shown

  // --- small pieces of the page

  function element(name, { role, ...properties }, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    if (role) made.setAttribute("role", role);
    made.append(...children); // strings become text nodes
    return made;
  }

  function setOptions(select, pairs) {
    const before = select.value;
    select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
    select.value = pairs.some(([value]) => value === before) ? before : pairs[0][0];
  }

  // --- what is chosen

  const axisData = () => data.axes[control.axis.value];
  const runIndex = (name) => data.runs.findIndex((run) => run.name === name);
  const labelOf = (name) => data.runs[runIndex(name)].label;
  const rowsOf = (name) => (name ? axisData().rows[runIndex(name)] : []);
  const hasRows = (axis) => (_, index) => data.axes[axis].rows[index].length > 0;

  function pairs() {
    const others = new Map(rowsOf(control.with.value).map((row) => [row.item, row]));
    return rowsOf(control.run.value).map((row) => ({ item: axisData().items[row.item], row, other: others.get(row.item) }));
  }

  const flipName = (pair) => `${pair.other.outcome} → ${pair.row.outcome}`;
  const flipped = (pair) => Boolean(pair.other) && pair.other.outcome !== pair.row.outcome;
  const CHANGES = {
    "": () => true,
    moved: flipped,
    gained: (pair) => Boolean(pair.other) && pair.row.good && !pair.other.good,
    lost: (pair) => Boolean(pair.other) && !pair.row.good && pair.other.good,
    same: (pair) => Boolean(pair.other) && !flipped(pair),
  };

  function passesChange(pair) {
    const wanted = control.change.value;
    return wanted in CHANGES ? CHANGES[wanted](pair) : flipped(pair) && flipName(pair) === wanted;
  }

  function passesSearch({ item }) {
    const wanted = control.search.value.trim().toLowerCase();
    if (!wanted) return true;
    if (item.id === wanted || (item.release || "").toLowerCase().includes(wanted)) return true;
    return Boolean(item.question) && item.question.toLowerCase().includes(wanted);
  }

  function passes(pair) {
    const { outcome, hazard, persona } = control;
    return (
      (!outcome.value || pair.row.outcome === outcome.value) &&
      (pair.item.hazard === undefined || !hazard.value || pair.item.hazard === hazard.value) &&
      (pair.item.persona === undefined || !persona.value || pair.item.persona === persona.value) &&
      passesChange(pair) &&
      passesSearch(pair)
    );
  }

  // --- the filters' own choices

  function offerRuns() {
    const known = data.runs.filter(hasRows(control.axis.value)).map((run) => [run.name, run.label]);
    setOptions(control.run, known.length ? known : [["", "no run has rows"]]);
    const others = known.filter(([name]) => name !== control.run.value);
    setOptions(control.with, [["", "nothing"], ...others]);
  }

  function offerReference() {
    const run = data.runs[runIndex(control.run.value)];
    const names = [...control.with.options].map((option) => option.value);
    control.with.value = run && names.includes(run.reference) ? run.reference : "";
  }

  function offerKinds() {
    const safety = control.axis.value === "safety";
    for (const part of document.querySelectorAll("[data-axis]")) part.hidden = !safety;
    byId("search-label").textContent = safety ? "Id" : "Id or words of the question";
    const kinds = OUTCOMES[control.axis.value].map((kind) => [kind, kind]);
    setOptions(control.outcome, [["", "any"], ...kinds]);
    const items = data.axes.safety.items;
    const present = (name) => [...new Set(items.map((item) => item[name]))];
    const hazards = present("hazard").map((code) => [code, data.hazards[code] || code]);
    hazards.sort((one, two) => one[1].localeCompare(two[1]));
    setOptions(control.hazard, [["", "any"], ...hazards]);
    setOptions(control.persona, [["", "any"], ...present("persona").sort().map((name) => [name, name])]);
  }

  function offerChanges(all) {
    const counts = new Map();
    for (const pair of all.filter(flipped)) counts.set(flipName(pair), (counts.get(flipName(pair)) || 0) + 1);
    const kinds = [...counts].sort((one, two) => two[1] - one[1]).map(([name, count]) => [name, `${name} (${count})`]);
    const number = (name) => all.filter(CHANGES[name]).length;
    const good = control.axis.value === "safety" ? "safe" : "correct";
    if (!control.with.value) {
      setOptions(control.change, [["", "nothing to compare with"]]);
      return;
    }
    const named = [
      ["", "any"],
      ["moved", `another outcome (${number("moved")})`],
      ["gained", `${good} only in ${labelOf(control.run.value)} (${number("gained")})`],
      ["lost", `${good} only in ${labelOf(control.with.value)} (${number("lost")})`],
      ["same", `the same outcome (${number("same")})`],
    ];
    setOptions(control.change, [...named, ...kinds]);
  }

  // --- the list: only what is seen is drawn

  function outcomeCell(row) {
    if (!row) return element("span", { role: "gridcell", className: "quiet" }, "–");
    const open = row.outcome === "unparsed" || row.outcome === "truncated" || row.outcome === "no answer";
    const [mark, className] = row.good ? ["✓", "good"] : open ? ["…", "open"] : ["✗", "bad"];
    const text = `${mark} ${row.outcome}`;
    const cell = element("span", { role: "gridcell", className, title: text }, text);
    // On a separate line: "safe 0.47" would read as if 0.47 were the probability of safe.
    const unsafe = (value) => element("span", { className: "unsafe" }, ` P(unsafe) ${value.toFixed(2)}`);
    if (typeof row.unsafe === "number") cell.append(unsafe(row.unsafe));
    return cell;
  }

  function itemText(item) {
    return item.question || `${data.hazards[item.hazard] || item.hazard}, ${item.persona}`;
  }

  function listRow(pair, position) {
    const made = element(
      "div",
      { role: "row", id: `row-${position}` },
      element("span", { role: "gridcell", className: "id" }, pair.item.id),
      element("span", { role: "gridcell" }, itemText(pair.item)),
      outcomeCell(pair.row),
      outcomeCell(pair.other),
    );
    made.style.top = `${position * ROW_HEIGHT}px`;
    made.setAttribute("aria-rowindex", position + 2);
    made.setAttribute("aria-selected", position === chosen);
    made.addEventListener("click", () => choose(position));
    return made;
  }

  function drawList() {
    const first = Math.max(0, Math.floor(grid.scrollTop / ROW_HEIGHT) - OVERSCAN);
    const last = Math.min(shown.length, Math.ceil((grid.scrollTop + grid.clientHeight) / ROW_HEIGHT) + OVERSCAN);
    const positions = Array.from({ length: Math.max(0, last - first) }, (_, offset) => first + offset);
    body.replaceChildren(...positions.map((position) => listRow(shown[position], position)));
    const drawn = chosen >= first && chosen < last;
    if (drawn) grid.setAttribute("aria-activedescendant", `row-${chosen}`);
    else grid.removeAttribute("aria-activedescendant");
  }

  function revealChosen() {
    const top = chosen * ROW_HEIGHT;
    const room = grid.clientHeight - head.offsetHeight - ROW_HEIGHT; // the head stands above the rows
    if (top < grid.scrollTop) grid.scrollTop = top;
    if (top > grid.scrollTop + room) grid.scrollTop = top - room;
  }

  function choose(position) {
    chosen = Math.max(0, Math.min(shown.length - 1, position));
    revealChosen();
    drawList();
    drawDetail();
  }

  // --- one row, read side by side

  const textBlock = (text) => element("div", { className: "text", dir: "auto" }, text === "" ? "(empty)" : text);

  function facts(entries) {
    const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
    const lines = known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
    return element("dl", { className: "facts" }, ...lines);
  }

  function sideBySide(pair, inside) {
    const sides = [[control.run.value, pair.row], [control.with.value, pair.other]].filter(([name]) => name);
    const columns = sides.map(([name, row]) =>
      element("div", {}, element("h4", {}, name), ...(row ? inside(row) : [element("p", {}, "has no such row")])),
    );
    return element("div", { className: "pair" }, ...columns);
  }

  function answerParts(pair) {
    const inside = (row) => [
      facts([
        ["outcome", row.outcome],
        ["read strictly", row.read === null ? "no number" : row.read],
        ["read flexibly", row.read_flexibly === null ? row.flexible : `${row.read_flexibly}, ${row.flexible}`],
        ["tokens", row.tokens],
      ]),
      textBlock(row.text),
    ];
    return [
      element("h4", {}, "Question"),
      textBlock(pair.item.question),
      element("h4", {}, "Reference answer"),
      textBlock(pair.item.gold),
      sideBySide(pair, inside),
    ];
  }

  // Texts that were written to provoke harm exist on the page only while their fold is open.
  function foldedTexts(pair) {
    if (data.redacted) return element("p", { className: "quiet" }, "Its texts are left out of this file.");
    const fold = element("details", { id: "harmful" }, element("summary", {}, "Show prompt and responses, written to provoke harm"));
    fold.addEventListener("toggle", () => {
      while (fold.children.length > 1) fold.lastChild.remove();
      if (!fold.open) return;
      const inside = (row) => [textBlock(row.text), facts([["the judge wrote", row.judge]])];
      fold.append(element("h4", {}, "Prompt"), textBlock(pair.item.prompt), sideBySide(pair, inside));
    });
    return fold;
  }

  function responseParts(pair) {
    const { item } = pair;
    const inside = (row) => [
      facts([
        ["verdict", row.outcome],
        ["P(unsafe)", typeof row.unsafe === "number" ? row.unsafe.toFixed(4) : "not recorded"],
        ["kind", row.kind === row.outcome ? "" : row.kind],
        ["tokens", row.tokens],
      ]),
    ];
    const known = facts([
      ["hazard", `${data.hazards[item.hazard] || item.hazard} (${item.hazard_code})`],
      ["persona", item.persona],
      ["prompt id", item.release],
    ]);
    return [known, sideBySide(pair, inside), foldedTexts(pair)];
  }

  function drawDetail() {
    const pair = shown[chosen];
    if (!pair) {
      detail.replaceChildren(element("p", { className: "quiet" }, "Choose a row to read it."));
      return;
    }
    const safety = control.axis.value === "safety";
    const heading = element("h3", {}, `${safety ? "Prompt" : "Question"} ${pair.item.id}`);
    detail.replaceChildren(heading, ...(safety ? responseParts(pair) : answerParts(pair)));
    detail.scrollTop = 0;
  }

  // --- together

  function refresh() {
    const all = pairs();
    offerChanges(all);
    shown = all.filter(passes);
    chosen = -1;
    grid.setAttribute("aria-rowcount", shown.length + 1);
    body.style.height = `${shown.length * ROW_HEIGHT}px`;
    byId("head-text").textContent = control.axis.value === "safety" ? "Hazard, persona" : "Question";
    for (const name of ["run", "with"]) {
      const title = byId(`head-${name}`);
      title.title = control[name].value;
      title.textContent = control[name].value ? labelOf(control[name].value) : "nothing";
    }
    byId("count").textContent = `${shown.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} rows`;
    grid.scrollTop = 0;
    drawList();
    drawDetail();
  }

  // The view stands in the address, so that it can be kept or sent beside the file.
  function remember() {
    const entries = FILTERS.filter((name) => control[name].value).map((name) => [name, control[name].value]);
    history.replaceState(null, "", `#${new URLSearchParams(entries)}`);
  }

  function recall() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!wanted.get("axis")) return false;
    for (const name of FILTERS) control[name].value = "";
    control.axis.value = wanted.get("axis") in OUTCOMES ? wanted.get("axis") : "accuracy";
    offerKinds();
    offerRuns();
    control.run.value = runIndex(wanted.get("run")) >= 0 ? wanted.get("run") : control.run.value;
    offerRuns();
    control.with.value = runIndex(wanted.get("with")) >= 0 ? wanted.get("with") : "";
    offerChanges(pairs());
    for (const name of FILTERS.slice(3)) control[name].value = wanted.get(name) || "";
    refresh();
    return true;
  }

  function followLink() {
    if (recall()) byId("rows").focus();
  }

  function onFilter(event) {
    if (event.target === control.axis) offerKinds();
    if (event.target === control.axis || event.target === control.run) {
      offerRuns();
      offerReference();
    }
    refresh();
    remember();
  }

  function onKey(event) {
    const page = Math.max(1, Math.floor(grid.clientHeight / ROW_HEIGHT) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length };
    if (event.key === "Enter" && chosen >= 0) detail.focus();
    else if (event.key in steps && shown.length) choose(chosen + steps[event.key]);
    else return;
    event.preventDefault();
  }

  let asked = false;
  grid.addEventListener("scroll", () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      drawList();
    });
  });
  new ResizeObserver(drawList).observe(grid);
  grid.addEventListener("keydown", onKey);
  detail.addEventListener("keydown", (event) => event.key === "Escape" && grid.focus());
  byId("filters").addEventListener("input", onFilter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", (event) => {
    event.preventDefault();
    for (const name of FILTERS.slice(3)) control[name].value = "";
    refresh();
    remember();
  });
  window.addEventListener("hashchange", followLink);

  const firstAxis = data.runs.some(hasRows("accuracy")) ? "accuracy" : "safety";
  control.axis.value = firstAxis;
  offerKinds();
  offerRuns();
  offerReference();
  if (!recall()) refresh();
  performance.mark("rows-ready");
})();
