// What the compiler made of one dispatch: a list of passes and of the stages behind them, and the chosen one's change
// or text.

const CONTEXT = 3;
const MOST_ROWS = 1500;
const unpacked = new Map();

// Histories are deflated JSON in base64: for each pass [[part, base, [[start, removed, [line, ...], quiet], ...]], ...].
async function unpack(name) {
  if (!unpacked.has(name)) {
    const packed = Uint8Array.from(atob(DATA.histories[name].packed), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(name, { steps: JSON.parse(await new Response(stream).text()), texts: new Map() });
  }
  return unpacked.get(name);
}

// Lines of a part after a pass. The passes before it are few, so that walking back to the first is quick.
function textAfter(history, index, part) {
  if (index < 0) return [];
  const key = `${index} ${part}`;
  if (!history.texts.has(key)) {
    const [, base, edits] = history.steps[index].find(([name]) => name === part);
    history.texts.set(key, edited(textAfter(history, base, part), edits));
  }
  return history.texts.get(key);
}

function edited(lines, edits) {
  let result = [];
  let at = 0;
  for (const [start, removed, inserted] of edits) {
    result = result.concat(lines.slice(at, start), inserted);
    at = start + removed;
  }
  return result.concat(lines.slice(at));
}

// Rows of a comparison: { left, before, right, after } with numbers and lines, null where a side has no line.
function comparison(before, edits) {
  const rows = [];
  let [left, right] = [0, 0];
  const same = (until) => {
    while (left < until) rows.push({ left: left + 1, before: before[left], right: ++right, after: before[left++] });
  };
  for (const [start, removed, inserted, isQuiet] of edits) {
    same(start);
    for (let index = 0; index < Math.max(removed, inserted.length); index++) {
      const [hasLeft, hasRight] = [index < removed, index < inserted.length];
      rows.push({ left: hasLeft ? left + 1 : null, before: hasLeft ? before[left] : null, right: hasRight ? right + 1 : null, after: hasRight ? inserted[index] : null, isChanged: !isQuiet });
      left += hasLeft;
      right += hasRight;
    }
  }
  same(before.length);
  return rows;
}

const unchanged = (lines) => lines.map((line, index) => ({ left: index + 1, before: line, right: index + 1, after: line }));

// Alternating runs of rows to show and rows to fold away.
function folded(rows, isWhole) {
  if (isWhole || !rows.some((row) => row.isChanged)) return [{ isShown: true, rows }];
  const near = new Uint8Array(rows.length);
  rows.forEach((row, index) => {
    if (row.isChanged || row.heading) near.fill(1, Math.max(0, index - CONTEXT), index + CONTEXT + 1);
  });
  const groups = [];
  rows.forEach((row, index) => {
    const isShown = near[index] === 1;
    if (groups.at(-1)?.isShown !== isShown) groups.push({ isShown, rows: [] });
    groups.at(-1).rows.push(row);
  });
  // A short run takes no more room than the button that would unfold it.
  return groups.map((group) => ({ ...group, isShown: group.isShown || group.rows.length <= CONTEXT }));
}

function cells(number, line, sign, kind, range, isShort) {
  if (line === null) return [h("td", { class: "line none" }), h("td", { class: "none" })];
  return [h("td", { class: `line ${kind}` }, `${number}${sign}`), h("td", { class: kind }, ...coloured(line, isShort, ...range))];
}

function rowElements({ heading, left, before, right, after, isChanged }, isSplit, isShort) {
  if (heading) return [h("tr", { class: "heading" }, h("th", { scope: "rowgroup", colspan: isSplit ? 4 : 3 }, heading))];
  if (!isChanged) {
    const plain = isSplit ? cells(left, before, " ", "", [], isShort) : h("td", { class: "line" }, left);
    return [h("tr", { class: isSplit ? "split" : null }, plain, cells(right, after, " ", "", [], isShort))];
  }
  const shared = before !== null && after !== null ? difference(before, after) : null;
  const old = () => cells(left, before, "−", "less", shared ? [shared[0], shared[1]] : [], isShort);
  const young = () => cells(right, after, "+", "more", shared ? [shared[0], shared[2]] : [], isShort);
  if (isSplit) return [h("tr", { class: "split" }, old(), young())];
  return [
    before !== null && h("tr", {}, old()[0], h("td", { class: "line less" }), old()[1]),
    after !== null && h("tr", {}, h("td", { class: "line more" }), young()),
  ].filter(Boolean);
}

// The table of a comparison, with buttons where rows are folded away.
function diffTable(rows, { isSplit, isWhole }) {
  const body = h("tbody");
  let budget = MOST_ROWS;
  const gap = (text, ...action) => {
    const cell = h("td", { colspan: isSplit ? 4 : 3 }, h("button", { type: "button" }, text));
    const row = h("tr", { class: "gap" }, cell);
    cell.firstChild.addEventListener("click", () => action[0](row));
    return row;
  };
  const put = (place, some) => {
    const now = some.slice(0, budget);
    budget -= now.length;
    const elements = now.flatMap((row) => rowElements(row, isSplit, !isWhole));
    if (now.length < some.length) {
      elements.push(gap(`Show the next of ${plural(some.length - now.length, "more line")}`, (row) => {
        budget = MOST_ROWS;
        put(row, some.slice(now.length));
      }));
    }
    if (place) place.replaceWith(...elements);
    else body.append(...elements);
  };
  for (const group of folded(rows, isWhole)) {
    if (group.isShown) put(null, group.rows);
    else body.append(gap(`${plural(group.rows.length, "unchanged line")}`, (row) => {
      budget = Math.max(budget, MOST_ROWS);
      put(row, group.rows);
    }));
  }
  const columns = isSplit ? ["line", null, "line", null] : ["line", "line", null];
  return h("table", {}, h("colgroup", {}, columns.map((kind) => h("col", { class: kind }))), body);
}

function diffPane(title, isComplete = false) {
  const heading = h("h3", {}, title);
  const code = h("div", { class: "code", tabindex: 0, role: "region", "aria-label": "IR" });
  const narrow = matchMedia("(max-width: 1000px)");
  const state = { isSplit: !narrow.matches, isWhole: isComplete, rows: null };
  const toggle = (label, name) => h("button", {
    class: "tool", type: "button", "aria-pressed": String(state[name]),
    onclick: (event) => {
      state[name] = !state[name];
      event.currentTarget.setAttribute("aria-pressed", String(state[name]));
      draw();
    },
  }, label);
  const element = h("div", { class: "diff" },
    h("div", { class: "bar" }, heading, h("div", { class: "tools" }, toggle("Side by side", "isSplit"), !isComplete && toggle("Whole text", "isWhole"))), code);
  function draw() {
    if (state.rows) code.replaceChildren(diffTable(state.rows, state));
  }
  return {
    element,
    show(text, rows) {
      heading.textContent = text;
      state.rows = rows;
      draw();
      code.scrollTop = 0;
    },
    say(text) {
      state.rows = null;
      code.replaceChildren(h("p", { class: "empty" }, text));
    },
  };
}

// The passes and stages of one history beside the change that each made.
function historyPane(name) {
  const meta = DATA.histories[name].steps;
  const pane = diffPane("");
  const items = meta.map((step, index) => h("li", { role: "option", id: `pass-${index}`, "aria-selected": "false", onclick: () => choose(index) },
    h("span", { class: "pass mono" }, step.pass),
    h("span", { class: "count" }, step.isStage ? plural(step.added, "line") : [h("span", { class: "added" }, `+${step.added}`), " ", h("span", { class: "removed" }, `−${step.removed}`)]),
    step.level && h("span", { class: "level quiet" }, step.level)));
  const list = h("ul", { class: "passes", role: "listbox", tabindex: 0, "aria-label": "Passes that changed it" }, items);
  let chosen = -1;
  async function choose(index) {
    items[chosen]?.setAttribute("aria-selected", "false");
    chosen = index;
    items[index].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", items[index].id);
    items[index].scrollIntoView({ block: "nearest" });
    const history = await unpack(name);
    if (chosen !== index) return;
    const parts = history.steps[index];
    const isText = index === 0 || meta[index].isStage;
    const rows = parts.flatMap(([part, base, edits]) => [
      ...(parts.length > 1 ? [{ heading: part }] : []),
      ...(isText ? unchanged(textAfter(history, index, part)) : comparison(textAfter(history, base, part), edits)),
    ]);
    const what = meta[index].isStage ? meta[index].level : index === 0 ? "the IR after it" : `${plural(meta[index].added, "line")} added, ${meta[index].removed} removed`;
    pane.show(`${index + 1} of ${meta.length}: ${meta[index].pass}, ${what}`, rows);
  }
  list.addEventListener("keydown", (event) => {
    const last = meta.length - 1;
    const steps = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + 10, PageUp: chosen - 10, Home: 0, End: last };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(Math.min(last, Math.max(0, steps[event.key])));
  });
  choose(0);
  return { element: h("div", { class: "history" }, list, pane.element), focus: () => list.focus() };
}
