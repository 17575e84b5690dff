// The page of a comparison: per function what each part adds, then where the compilations part.

// Parts that get a bar, and the part of the largest change below which they do not.
const MOST_BARS = 14;
const SMALL = 0.01;
const sign = (value) => (value > 0 ? "+" : value < 0 ? "−" : "");
const signed = (ns) => sign(ns) + duration(Math.abs(ns));
const by = (ratio) => (Math.abs(ratio - 1) < 5e-5 ? "0%" : sign(ratio - 1) + percent(Math.abs(ratio - 1)));
const isWild = (value) => value === null || value > 100;
const range = (change) => `${by(change.low)} to ${isWild(change.high) ? "any" : by(change.high)}`;
const floor = (change) => (isWild(change.floor) ? "beyond measure" : percent(change.floor));
const only = (row) => (row.side === "both" ? null : h("span", { class: "chip" }, `only in ${row.side.toUpperCase()}`));
const isCertain = (row) => row.side !== "both" || Boolean(row.change?.isCalled);

function verdict(row) {
  if (row.side !== "both") return row.side === "a" ? "gone" : "new";
  if (!row.change) return "not judged";
  if (!row.change.isCalled) return "within noise";
  return row.change.ratio > 1 ? "slower" : "faster";
}

// From A to B, a line a part: where it begins, the parts before it ended.
function waterfall(data) {
  const largest = Math.max(...data.rows.map((row) => Math.abs(row.deltaNs)));
  const matters = (row, index) => index < MOST_BARS && Math.abs(row.deltaNs) >= SMALL * largest;
  const shown = data.rows.filter(matters);
  const rest = data.rows.filter((row, index) => !matters(row, index));
  const steps = shown.map((row) => ({ row, label: row.label, deltaNs: row.deltaNs, isCertain: isCertain(row) }));
  if (rest.length) steps.push({ label: plural(rest.length, "smaller part"), deltaNs: rest.reduce((sum, row) => sum + row.deltaNs, 0), isCertain: rest.some(isCertain) });
  let at = data.aNs;
  for (const item of steps) {
    item.from = at;
    at += item.deltaNs;
    item.to = at;
  }
  const points = [data.aNs, at, ...steps.map((item) => item.to)];
  const [least, most] = [Math.min(...points), Math.max(...points)];
  // A change of some per cent would not be seen on an axis from zero.
  const low = Math.max(0, least - Math.max(0.35 * (most - least), 0.01 * most));
  const place = (ns) => `${(100 * (ns - low)) / (most - low || 1)}%`;
  const line = (name, from, to, kind, numbers) => {
    const bar = h("span", { class: kind });
    bar.style.left = place(Math.min(from, to));
    bar.style.width = `${Math.max(0.15, (100 * Math.abs(to - from)) / (most - low || 1))}%`;
    return h("li", {}, h("span", { class: "name" }, name), h("span", { class: "track", "aria-hidden": "true" }, bar), numbers.map((number) => h("span", { class: "number" }, number)));
  };
  const drifted = data.drift !== null && Math.abs(data.drift - 1) >= 0.01;
  const list = h("ol", { class: "waterfall" },
    line("A", low, data.aNs, "total", [duration(data.aNs), ""]),
    steps.map((item) => line([item.label, " ", item.row && only(item.row)], item.from, item.to, `${item.deltaNs > 0 ? "worse" : "better"}${item.isCertain ? "" : " unsure"}`, [signed(item.deltaNs), item.row ? verdict(item.row) : ""])),
    line(drifted ? "B, the common drift taken out" : "B", low, at, "total", [duration(at), ""]));
  return section("From A to B", `What each part adds to a call, largest first; pale bars are not certain. Bars begin at ${duration(low)}.`, list);
}

function parts(data) {
  const columns = [
    { label: "Part", head: true, value: (row) => row.label, cell: (row) => [h("span", { class: "mono" }, row.label), " ", only(row),
      h("span", { class: "quiet" }, [row.detail, row.exports.length === 1 && row.exports[0]].filter(Boolean).join(" · "))] },
    { label: "A", numeric: true, value: (row) => row.aNs, cell: (row) => (row.aNs === null ? "—" : duration(row.aNs)) },
    { label: "B", numeric: true, value: (row) => row.bNs, cell: (row) => (row.bNs === null ? "—" : duration(row.bNs)) },
    { label: "Adds", numeric: true, value: (row) => row.deltaNs, cell: (row) => h("span", { class: isCertain(row) ? (row.deltaNs > 0 ? "worse" : "better") : null }, signed(row.deltaNs)) },
    { label: "Share", numeric: true, title: "of the function's change", value: (row) => row.share, cell: (row) => (row.share === null ? "" : Math.abs(row.share) < 5e-5 ? "0%" : percent(row.share).replace("-", "−")) },
    { label: "Change", numeric: true, title: "with its interval at 95%", value: (row) => row.change?.ratio, cell: (row) => row.change && [by(row.change.ratio), h("div", { class: "quiet" }, range(row.change))] },
    { label: "Noise floor", numeric: true, value: (row) => row.change?.floor, cell: (row) => row.change && floor(row.change) },
    { label: "Verdict", value: (row) => verdict(row), cell: (row) => h("span", { class: "verdict" }, verdict(row)) },
  ];
  // Parts that hardly moved come last, whichever way they went.
  columns[3].value = (row) => Math.abs(row.deltaNs);
  const table = sortable({ label: `Parts of ${data.name}`, columns, rows: data.rows, sort: 3 });
  table.show(data.rows);
  return section("Parts", plural(data.rows.length, "row"), table.element);
}

// Rows of a unified diff; what is none, such as how attributes of the target differ, has no rows.
function hunkRows(lines) {
  const rows = [];
  let [left, right, first] = [1, 1, 0];
  for (const line of lines) {
    const place = /^@@ -(\d+)(?:,\d+)? \+(\d+)/.exec(line);
    if (place) {
      [left, right] = [Number(place[1]), Number(place[2])];
      rows.push({ heading: line });
      first = rows.length;
    } else if (line.startsWith("-")) rows.push({ left: left++, before: line.slice(1), right: null, after: null, isChanged: true });
    else if (line.startsWith("+")) {
      // Beside the first removed line that still stands alone.
      const partner = rows.slice(first).find((row) => row.isChanged && row.after === null);
      if (partner) Object.assign(partner, { right: right++, after: line.slice(1) });
      else rows.push({ left: null, before: null, right: right++, after: line.slice(1), isChanged: true });
    } else {
      rows.push({ left: left++, before: line.slice(1), right: right++, after: line.slice(1) });
      first = rows.length;
    }
  }
  return rows;
}

function explanation(item) {
  const children = [];
  const rows = item.hunk.some((line) => line.startsWith("@@")) ? hunkRows(item.hunk) : [];
  if (rows.length) {
    const pane = diffPane("A beside B", true);
    pane.element.classList.add("framed");
    pane.show("A beside B, the first lines that differ", rows);
    children.push(pane.element);
  } else if (item.hunk.length) children.push(h("pre", { class: "framed mono", tabindex: 0, "aria-label": "What differs" }, item.hunk.join("\n")));
  const ran = [["A", item.onlyA], ["B", item.onlyB]].filter(([, names]) => names.length);
  if (ran.length) children.push(h("dl", { class: "passes-of" }, ran.map(([side, names]) => [h("dt", {}, `Only ${side} ran`), h("dd", { class: "mono" }, names.join(", "))])));
  if (item.configs.some(([, a, b]) => a !== b)) {
    children.push(h("details", {}, h("summary", {}, "How each side is lowered"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Lowering" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Op", "A", "B"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, item.configs.map(([op, a, b]) => h("tr", {}, h("th", { scope: "row", class: "mono" }, op), h("td", { class: "mono" }, a), h("td", { class: "mono" }, a === b ? "the same" : b))))))));
  }
  return h("article", {}, h("h3", {}, item.label), h("p", {}, item.reason), children);
}

MAIN.append(
  h("header", {}, h("p", { class: "eyebrow" }, DATA.eyebrow),
    DATA.functions.length === 1 ? h("h1", {}, DATA.functions[0].summary) : [h("h1", {}, "Two captures compared"), DATA.functions.map((data) => h("p", { class: "summary" }, data.summary))],
    DATA.notes.map((note) => h("p", { class: "notice" }, note)),
    h("details", {}, h("summary", {}, "What was recorded"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "What was recorded" }, h("table", {},
      h("thead", {}, h("tr", {}, ["", "A", "B"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, DATA.sides.map(([name, a, b]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, a), h("td", {}, a === b ? "the same" : b)))))))),
  ...DATA.functions.flatMap((data) => [
    DATA.functions.length > 1 ? h("h2", { class: "part" }, data.name) : "",
    h("dl", { class: "facts" }, fact("A, a call", duration(data.aNs)), fact("B, a call", duration(data.bNs)),
      data.change && fact("change", `${by(data.change.ratio)}, ${range(data.change)}`), data.change && fact("noise floor", floor(data.change)),
      data.drift !== null && Math.abs(data.drift - 1) >= 0.01 && fact("common drift", by(data.drift)), fact("processes", data.processes.join(" and "))),
    waterfall(data), parts(data)]),
  DATA.explanations.length ? section("Where the compilations part", null, DATA.explanations.map(explanation)) : "");
