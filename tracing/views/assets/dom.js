// Elements, numbers in words, and the one way in which charts are walked by keyboard.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const DATA = JSON.parse(document.getElementById("data").textContent);
const MAIN = document.getElementById("main");

function digits(value) {
  const size = Math.abs(value);
  return value.toLocaleString("en", { useGrouping: false, minimumFractionDigits: 0, maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : 2 });
}
function scaled(value, units) {
  const [factor, unit] = units.find(([limit]) => Math.abs(value) >= limit) ?? units[units.length - 1];
  return `${digits(value / factor)} ${unit}`;
}
const duration = (ns) => (ns === 0 ? "0" : scaled(ns, [[1e9, "s"], [1e6, "ms"], [1e3, "µs"], [1, "ns"]]));
const bytes = (count) => scaled(count, [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]);
const percent = (share) => `${(100 * share).toFixed(share !== 0 && Math.abs(share) < 0.1 ? 2 : 1)}%`;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// A symbol that may go on in the next line after an underscore.
const breakable = (symbol) => symbol.split(/(?<=_)/).flatMap((part, index) => (index ? [h("wbr"), part] : [part]));

// Ticks at 1, 2 or 5 times a power of ten, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const result = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) result.push(tick);
  return result;
}

// A chart whose marks are the options of a listbox: one stop for Tab, arrows inside, Enter opens.
// `marks()` gives the drawn elements by number; a mark that is out of sight is null.
class Picker {
  constructor({ root, readout, count, describe, open, moved, keys, hint }) {
    Object.assign(this, { root, readout, count, describe, open, moved, keys });
    this.active = -1;
    this.hint = hint;
    this.marks = [];
    readout.replaceChildren(h("span", { class: "quiet" }, hint));
    root.addEventListener("keydown", (event) => this.keydown(event));
    root.addEventListener("focus", () => this.active < 0 && this.count() && root.matches(":focus-visible") && this.pick(0));
    root.addEventListener("pointerover", (event) => {
      const index = event.target.dataset?.index;
      if (index !== undefined) this.pick(Number(index), false);
    });
    root.addEventListener("click", (event) => {
      const index = event.target.dataset?.index;
      if (index !== undefined) this.open(Number(index));
    });
  }

  keydown(event) {
    const last = this.count() - 1;
    const steps = { ArrowRight: this.active + 1, ArrowDown: this.active + 1, ArrowLeft: this.active - 1, ArrowUp: this.active - 1, Home: 0, End: last };
    if (event.altKey || event.ctrlKey || event.metaKey || last < 0) return;
    if (this.keys?.(event)) event.preventDefault();
    else if (event.key in steps && !event.shiftKey) {
      event.preventDefault();
      this.pick(Math.min(last, Math.max(0, steps[event.key])));
    } else if ((event.key === "Enter" || event.key === " ") && this.active >= 0) {
      event.preventDefault();
      this.open(this.active);
    }
  }

  pick(index, byKeyboard = true) {
    this.active = index;
    if (byKeyboard) this.moved?.(index);
    this.show();
    this.readout.replaceChildren(...this.describe(index));
  }

  // After marks were drawn anew.
  draw(marks) {
    this.marks = marks;
    this.show();
  }

  reset() {
    this.active = -1;
    this.readout.replaceChildren(h("span", { class: "quiet" }, this.hint));
  }

  show() {
    this.root.querySelectorAll(".active").forEach((mark) => {
      mark.classList.remove("active");
      mark.setAttribute("aria-selected", "false");
    });
    const mark = this.marks[this.active];
    if (mark) {
      mark.classList.add("active");
      mark.setAttribute("aria-selected", "true");
      this.root.setAttribute("aria-activedescendant", mark.id);
    } else this.root.removeAttribute("aria-activedescendant");
  }
}

function listbox(label, ...children) {
  return h("div", { class: "widget", role: "listbox", tabindex: 0, "aria-label": label }, ...children);
}

// Draws now and whenever the element's width changes.
function onWidth(element, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (element.clientWidth && element.clientWidth !== width) draw((width = element.clientWidth));
  }).observe(element);
}

function section(title, caption, ...children) {
  return h("section", { "aria-label": title }, h("header", {}, h("h2", {}, title), caption && h("p", { class: "quiet" }, caption)), ...children);
}

const fact = (label, value) => value !== null && value !== undefined && value !== "" && h("div", {}, h("dt", {}, label), h("dd", {}, value));

// A table whose columns sort: { label, value(row), cell(row), numeric, head } each.
function sortable({ label, columns, rows, sort, descending = true }) {
  const body = h("tbody");
  const heads = columns.map((column) =>
    h("th", { scope: "col", class: column.numeric ? "n" : null, title: column.title },
      h("button", { type: "button", onclick: () => order(column, column === chosen ? !down : Boolean(column.numeric)) }, column.label)));
  let chosen = columns[sort];
  let down = descending;
  let shown = rows;
  function order(column, isDown) {
    [chosen, down] = [column, isDown];
    heads.forEach((head, index) => {
      if (columns[index] === column) head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const compare = (a, b) => {
      const [left, right] = [column.value(a), column.value(b)];
      if (left === right) return 0;
      if (left === null || left === undefined) return 1;
      if (right === null || right === undefined) return -1;
      return (left < right ? -1 : 1) * (isDown ? -1 : 1);
    };
    body.replaceChildren(...[...shown].sort(compare).map((row) =>
      h("tr", {}, columns.map((column) => column.head
        ? h("th", { scope: "row" }, column.cell(row))
        : h("td", { class: column.numeric ? "n" : null }, column.cell(row))))));
  }
  const element = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
  return {
    element,
    show(next) {
      shown = next;
      order(chosen, down);
    },
  };
}
