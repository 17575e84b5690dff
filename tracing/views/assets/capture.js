// The page of a capture. One step of the chosen function stands for all; whatever is chosen, all charts follow.

const colour = (kind) => {
  const place = DATA.kinds.indexOf(kind);
  return place >= 0 && place < 8 ? `k${place}` : "rest";
};
const swatch = (kind) => h("span", { class: `swatch ${colour(kind)}`, "aria-hidden": "true" });
const label = (kind) => kind.replaceAll("_", " ");
const moved = (site) => (site.read === null && site.written === null ? null : (site.read ?? 0) + (site.written ?? 0));
const title = (site) => site.weight ?? site.key;

// Rows of the table by the place of a dispatch: one export may have a row for each of its shapes.
for (const each of DATA.functions) {
  each.rowOf = new Map(each.rows.flatMap((row) => row.places.map((place) => [place, row])));
}
let step = DATA.functions[0];
let chosenKind = null;
const views = [];
const redraw = () => views.forEach((view) => view());
const isDim = (kind) => chosenKind !== null && kind !== chosenKind;
const byKind = (kind) => {
  chosenKind = chosenKind === kind ? null : kind;
  redraw();
};

// What is known of one dispatch of the step, in a sentence.
function describeRun([place, , ns, tileNs, , workgroups]) {
  const site = step.sites[place];
  const amount = moved(site);
  const parts = [
    label(site.kind),
    site.layer !== null && `layer ${site.layer}`,
    site.shape,
    `${duration(ns)}, ${percent(ns / step.wallNs)} of the step`,
    ns && `busy threads ${digits(tileNs / ns)}`,
    `workgroups ${workgroups.join("×")}`,
    amount && ns && `${digits(amount / ns)} GB/s` + (DATA.roofs.bandwidth ? ` (${percent(amount / ns / (DATA.roofs.bandwidth / 1e9))} of the roof)` : ""),
    site.flops && ns && `${digits(site.flops / ns)} GFLOP/s`,
  ].filter(Boolean);
  return [title(site), parts.join(" · ")];
}
const readout = ([head, text], kind) => [kind ? swatch(kind) : "", h("b", {}, head), h("br"), h("span", { class: "quiet" }, text)];

function timeline() {
  const [overviewHeight, bandTop, axisTop, margin] = [16, 26, 84, 1];
  const overview = svg("svg", { class: "chart", height: overviewHeight + 6, role: "none", "aria-hidden": "true" });
  const chart = svg("svg", { class: "chart", role: "none" });
  const note = h("div", { class: "readout" });
  const root = listbox("Dispatches of the step, in order of time", chart);
  let [from, to, width] = [0, 1, 0];
  let lanes = [];
  const end = () => Math.max(step.wallNs, ...step.runs.map((run) => run[1] + run[2]), 1);
  const x = (ns) => ((ns - from) / (to - from)) * width;

  function zoom(factor, at = (from + to) / 2) {
    const span = Math.min(end(), Math.max(1000, (to - from) / factor));
    look(at - ((at - from) / (to - from)) * span, span);
  }
  function look(start, span = to - from) {
    from = Math.max(0, Math.min(end() - span, start));
    to = from + span;
    draw();
  }
  const pan = (share) => look(from + share * (to - from));
  function fit() {
    [from, to] = [0, end()];
    draw();
  }

  const picker = new Picker({
    root,
    readout: note,
    hint: "Arrow keys go from dispatch to dispatch, + and − zoom, 0 shows all, Enter opens. With a mouse: drag to pan, Ctrl and wheel to zoom.",
    count: () => step.runs.length,
    describe: (index) => readout(describeRun(step.runs[index]), step.sites[step.runs[index][0]].kind),
    open: (index) => openDispatch(step.rowOf.get(step.runs[index][0]), step.runs[index]),
    moved: (index) => {
      const [, start, ns] = step.runs[index];
      if (start < from || start + ns > to) look(start + ns / 2 - (to - from) / 2);
    },
    keys: (event) => {
      const run = step.runs[picker.active];
      const center = run ? run[1] + run[2] / 2 : undefined;
      if (event.key === "+" || event.key === "=") zoom(1.6, center);
      else if (event.key === "-") zoom(1 / 1.6, center);
      else if (event.key === "0") fit();
      else if (event.shiftKey && event.key === "ArrowRight") pan(0.25);
      else if (event.shiftKey && event.key === "ArrowLeft") pan(-0.25);
      else return false;
      return true;
    },
  });

  // Dispatches that overlap stand below each other.
  function layOut() {
    const ends = [];
    lanes = step.runs.map(([, start, ns]) => {
      let lane = ends.findIndex((until) => until <= start);
      if (lane < 0) lane = ends.push(0) - 1;
      ends[lane] = start + ns;
      return lane;
    });
    return Math.max(1, ends.length);
  }

  function layerBands() {
    const bands = [];
    for (const [place, start, ns] of step.runs) {
      const { layer } = step.sites[place];
      const last = bands.at(-1);
      if (last && last.layer === layer) last.end = start + ns;
      else bands.push({ layer, start, end: start + ns });
    }
    return bands.filter((band) => band.layer !== null);
  }

  function draw() {
    if (!width) return;
    const count = layOut();
    const height = Math.max(14, 56 / count);
    const top = bandTop;
    const bottom = top + count * height;
    const total = bottom + 20;
    chart.setAttribute("viewBox", `0 0 ${width} ${total}`);
    chart.setAttribute("height", total);
    const marks = [];
    const items = [svg("rect", { class: "between", x: x(0), y: top, width: Math.max(0, x(step.wallNs) - x(0)), height: bottom - top })];
    layerBands().forEach((band) => {
      const [left, right] = [Math.max(0, x(band.start)), Math.min(width, x(band.end))];
      if (right <= 0 || left >= width) return;
      items.push(svg("rect", { class: "layer", x: left, y: 2, width: Math.max(0.5, right - left - 1), height: 17, rx: 2 }));
      const text = right - left > 62 ? `layer ${band.layer}` : `${band.layer}`;
      if (right - left > 20 || (band.layer % 5 === 0 && right - left > 4)) items.push(svg("text", { x: (left + right) / 2, y: 14.5, "text-anchor": "middle" }, text));
    });
    step.runs.forEach(([place, start, ns], index) => {
      const [left, right] = [x(start), x(start + ns)];
      if (right < 0 || left > width) return;
      const site = step.sites[place];
      const [head, text] = describeRun(step.runs[index]);
      const gap = right - left > 3 ? 1 : 0;
      marks[index] = svg("rect", {
        class: `${colour(site.kind)}${isDim(site.kind) ? " dim" : ""}`, role: "option", id: `run-${index}`, "data-index": index, "aria-selected": "false",
        "aria-label": `${head}, ${text}`, x: left, y: top + lanes[index] * height, width: Math.max(0.6, right - left - gap), height: height - (count > 1 ? 1 : 0),
      });
      items.push(marks[index]);
      if (right - left > 90 && lanes[index] === 0 && count === 1) {
        const visible = Math.max(left, 0);
        const room = Math.floor((Math.min(right, width) - visible - 10) / 6.4);
        const name = label(site.kind);
        if (room > 6) items.push(svg("text", { x: visible + 6, y: top + 33, class: "on-bar", "pointer-events": "none" }, name.length > room ? `${name.slice(0, room - 1)}…` : name));
      }
    });
    for (const tick of ticks(from, to, width / 110)) {
      items.push(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 5 }));
      items.push(svg("text", { x: Math.min(width - margin, Math.max(margin, x(tick))), y: bottom + 17, "text-anchor": x(tick) < 20 ? "start" : x(tick) > width - 20 ? "end" : "middle" }, duration(tick)));
    }
    chart.replaceChildren(...items);
    picker.draw(marks);
    const scale = width / end();
    overview.setAttribute("viewBox", `0 0 ${width} ${overviewHeight + 6}`);
    overview.replaceChildren(
      svg("rect", { class: "between", x: 0, y: 0, width, height: overviewHeight }),
      ...step.runs.map(([place, start, ns]) => svg("rect", { class: `${colour(step.sites[place].kind)}${isDim(step.sites[place].kind) ? " dim" : ""}`, x: start * scale, y: 0, width: Math.max(0.3, ns * scale), height: overviewHeight })),
      ...(to - from < end() ? [svg("rect", { class: "window", x: from * scale, y: 0.5, width: Math.max(2, (to - from) * scale), height: overviewHeight - 1 })] : []),
    );
  }

  let drag = null;
  root.addEventListener("pointerdown", (event) => {
    if (event.button === 0) drag = { x: event.clientX, from, isMoved: false };
  });
  root.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const by = event.clientX - drag.x;
    if (!drag.isMoved && Math.abs(by) < 4) return;
    if (!drag.isMoved) root.setPointerCapture(event.pointerId);
    drag.isMoved = true;
    look(drag.from - (by / width) * (to - from));
  });
  const drop = () => (drag = null);
  root.addEventListener("pointerup", drop);
  root.addEventListener("pointercancel", drop);
  root.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const at = from + ((event.clientX - chart.getBoundingClientRect().left) / width) * (to - from);
    zoom(1.2 ** (-Math.sign(event.deltaY)), at);
  }, { passive: false });
  overview.addEventListener("pointerdown", (event) => {
    const seek = (moved) => look(((moved.clientX - overview.getBoundingClientRect().left) / width) * end() - (to - from) / 2);
    overview.setPointerCapture(event.pointerId);
    seek(event);
    overview.addEventListener("pointermove", seek);
    overview.addEventListener("pointerup", () => overview.removeEventListener("pointermove", seek), { once: true });
  });

  const tool = (text, name, action) => h("button", { class: "tool", type: "button", "aria-label": name, onclick: action }, text);
  const box = section("Step", null, h("div", { class: "overview" }, overview), root, note);
  const caption = h("p", { class: "quiet" });
  box.querySelector("header").append(caption, h("div", { class: "tools" },
    tool("−", "Zoom out", () => zoom(1 / 1.6)), tool("+", "Zoom in", () => zoom(1.6)), tool("◂", "Earlier", () => pan(-0.5)), tool("▸", "Later", () => pan(0.5)), tool("All", "Show the whole step", fit)));
  onWidth(chart, (next) => {
    width = next;
    draw();
  });
  let drawn = null;
  views.push(() => {
    caption.textContent = `${step.callLabel}, to the beginning of the next. Colours are kinds; grey is time in which no dispatch ran.`;
    if (drawn !== step) {
      drawn = step;
      picker.reset();
      [from, to] = [0, end()];
    }
    draw();
  });
  return { box, zoomTo: (start, stop) => {
    picker.pick(step.runs.findIndex((run) => run[1] >= start));
    look(start - (stop - start) * 0.05, Math.min(end(), (stop - start) * 1.1));
    root.focus();
  } };
}

function kinds() {
  const list = h("ul", { class: "kinds" });
  views.push(() => {
    const sums = new Map();
    for (const [place, , ns] of step.runs) {
      const { kind } = step.sites[place];
      const sum = sums.get(kind) ?? [0, 0];
      sums.set(kind, [sum[0] + ns, sum[1] + 1]);
    }
    const rows = [...sums].sort((a, b) => b[1][0] - a[1][0]);
    const most = Math.max(step.betweenNs, ...rows.map((row) => row[1][0]), 1);
    const cellsOf = (name, kind, ns, count) => {
      const bar = h("span", { class: kind });
      bar.style.width = `${(100 * ns) / most}%`;
      return [h("span", { class: "name" }, h("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), name), h("span", { class: "track", "aria-hidden": "true" }, bar),
        h("span", { class: "number" }, duration(ns)), h("span", { class: "number" }, percent(ns / step.wallNs)), h("span", { class: "number quiet times" }, count)];
    };
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.kind : null;
    list.replaceChildren(
      ...rows.map(([kind, [ns, count]]) => h("li", {}, h("button", { type: "button", "data-kind": kind, "aria-pressed": String(chosenKind === kind), onclick: () => byKind(kind) }, ...cellsOf(label(kind), colour(kind), ns, `${count}×`)))),
      h("li", {}, h("div", {}, ...cellsOf("between dispatches", "rest", step.betweenNs, ""))),
    );
    [...list.querySelectorAll("button")].find((button) => button.dataset.kind === focused)?.focus();
  });
  return section("Kinds", "Time of the step. Choose one to see it alone everywhere.", list);
}

function roofline() {
  const chart = svg("svg", { class: "chart", role: "none" });
  const note = h("div", { class: "readout" });
  const root = listbox("Dispatches under the roofs of the machine, longest first", chart);
  const box = section("Roofline", "A dot for each dispatch, with all its call sites; its area is time.", root, note);
  let points = [];
  const picker = new Picker({
    root,
    readout: note,
    hint: "Arrow keys go from dot to dot, longest first; Enter opens.",
    count: () => points.length,
    describe: (index) => readout(words(points[index]), points[index].kind),
    open: (index) => openDispatch(points[index].row),
  });
  const words = (point) => [point.key, [
    label(point.kind), plural(point.count, "call"), `${duration(point.ns)}, ${percent(point.ns / step.wallNs)} of the step`, `${digits(point.intensity)} FLOP a byte`,
    `${digits(point.rate / 1e9)} GFLOP/s`, point.roof && `${percent(point.rate / point.roof)} of what the machine could do`].filter(Boolean).join(" · ")];

  function collect() {
    const groups = new Map();
    for (const [place, , ns] of step.runs) {
      const site = step.sites[place];
      if (!moved(site) || !site.flops || !ns) continue;
      const row = step.rowOf.get(place);
      const group = groups.get(row) ?? { row, key: row.name, kind: site.kind, ns: 0, flops: 0, bytes: 0, count: 0 };
      group.ns += ns;
      group.flops += site.flops;
      group.bytes += moved(site);
      group.count += 1;
      groups.set(row, group);
    }
    const { bandwidth, flops } = DATA.roofs;
    points = [...groups.values()].sort((a, b) => b.ns - a.ns);
    for (const point of points) {
      point.intensity = point.flops / point.bytes;
      point.rate = point.flops / (point.ns / 1e9);
      point.roof = bandwidth ? Math.min(flops ?? Infinity, bandwidth * point.intensity) : flops;
    }
  }

  function draw(width) {
    const [height, left, bottom, top, right] = [280, 44, 34, 24, 12];
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.setAttribute("height", height);
    if (!points.length) {
      chart.replaceChildren(svg("text", { x: 12, y: 30 }, "Neither bytes nor operations of these dispatches are known."));
      picker.draw([]);
      return;
    }
    const { bandwidth, flops } = DATA.roofs;
    const ridge = bandwidth && flops ? flops / bandwidth : null;
    const across = points.map((point) => point.intensity).concat(ridge ? [ridge * 2] : []);
    const up = points.map((point) => point.rate).concat(flops ? [flops * 1.6] : [], bandwidth ? [bandwidth * Math.min(...points.map((point) => point.intensity))] : []);
    const bounds = (values) => [Math.floor(Math.log10(Math.min(...values)) - 0.1), Math.ceil(Math.log10(Math.max(...values)) + 0.1)];
    const [[x0, x1], [y0, y1]] = [bounds(across), bounds(up)];
    const x = (value) => left + ((Math.log10(value) - x0) / (x1 - x0)) * (width - left - right);
    const y = (value) => height - bottom - ((Math.log10(value) - y0) / (y1 - y0)) * (height - bottom - top);
    const items = [];
    for (let power = x0; power <= x1; power++) {
      items.push(svg("line", { class: "grid", x1: x(10 ** power), x2: x(10 ** power), y1: top, y2: height - bottom }));
      items.push(svg("text", { x: x(10 ** power), y: height - bottom + 14, "text-anchor": "middle" }, digits10(power)));
    }
    for (let power = y0; power <= y1; power++) {
      items.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power) }));
      items.push(svg("text", { x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, digits10(power - 9)));
    }
    items.push(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "FLOP a byte"));
    items.push(svg("text", { x: 2, y: 10 }, "GFLOP/s"));
    const knee = ridge ?? (bandwidth ? 10 ** x1 : 10 ** x0);
    if (bandwidth) {
      const start = Math.max(10 ** x0, 10 ** y0 / bandwidth);
      const stop = Math.min(knee, 10 ** y1 / bandwidth, 10 ** x1);
      items.push(svg("line", { class: "roof", x1: x(start), y1: y(start * bandwidth), x2: x(stop), y2: y(stop * bandwidth) }));
      const angle = (-Math.atan2(y(start * bandwidth) - y(stop * bandwidth), x(stop) - x(start)) * 180) / Math.PI;
      const middle = Math.sqrt(start * stop);
      items.push(svg("text", { x: x(middle), y: y(middle * bandwidth) - 7, "text-anchor": "middle", transform: `rotate(${angle} ${x(middle)} ${y(middle * bandwidth)})` }, `memory, ${bytes(bandwidth)}/s`));
    }
    if (flops) {
      items.push(svg("line", { class: "roof", x1: x(knee), y1: y(flops), x2: width - right, y2: y(flops) }));
      items.push(svg("text", { x: width - right, y: y(flops) - 6, "text-anchor": "end" }, `arithmetic, ${digits(flops / 1e9)} GFLOP/s`));
    }
    const most = Math.max(...points.map((point) => point.ns));
    const marks = points.map((point, index) => {
      const [head, text] = words(point);
      return svg("circle", {
        class: `${colour(point.kind)}${isDim(point.kind) ? " dim" : ""}`, role: "option", id: `point-${index}`, "data-index": index, "aria-selected": "false", "aria-label": `${head}, ${text}`,
        cx: x(point.intensity), cy: y(point.rate), r: 3 + 9 * Math.sqrt(point.ns / most),
      });
    });
    chart.replaceChildren(...items, ...marks);
    picker.draw(marks);
  }
  const digits10 = (power) => (power < -2 || power > 4 ? `1e${power}` : String(Number((10 ** power).toPrecision(1))));
  let known = 0;
  onWidth(chart, (width) => {
    known = width;
    draw(width);
  });
  let drawn = null;
  views.push(() => {
    if (drawn !== step) {
      drawn = step;
      collect();
      picker.reset();
    }
    if (known) draw(known);
  });
  return box;
}

function layers(zoomTo) {
  const chart = svg("svg", { class: "chart", role: "none" });
  const note = h("div", { class: "readout" });
  const root = listbox("Layers of the model", chart);
  const box = section("Layers", "Time of each, by kind. Enter or a click shows it in the step above.", root, note);
  let columns = [];
  const name = (column) => (column.layer === null ? "outside layers" : `layer ${column.layer}`);
  const words = (column) => [name(column), [`${duration(column.ns)}, ${percent(column.ns / step.wallNs)} of the step`, ...[...column.kinds].sort((a, b) => b[1] - a[1]).map(([kind, ns]) => `${label(kind)} ${duration(ns)}`)].join(" · ")];
  const picker = new Picker({
    root,
    readout: note,
    hint: "Arrow keys go from layer to layer.",
    count: () => columns.length,
    describe: (index) => readout(words(columns[index])),
    open: (index) => columns[index].layer !== null && zoomTo(columns[index].start, columns[index].end),
  });
  function collect() {
    const found = new Map();
    for (const [place, start, ns] of step.runs) {
      const site = step.sites[place];
      const column = found.get(site.layer) ?? { layer: site.layer, ns: 0, kinds: new Map(), start, end: 0 };
      column.ns += ns;
      column.end = Math.max(column.end, start + ns);
      column.kinds.set(site.kind, (column.kinds.get(site.kind) ?? 0) + ns);
      found.set(site.layer, column);
    }
    columns = [...found.values()].sort((a, b) => (a.layer ?? Infinity) - (b.layer ?? Infinity));
  }
  function draw(width) {
    const [height, bottom, left] = [132, 18, 48];
    const most = Math.max(...columns.map((column) => column.ns), 1);
    const pitch = Math.min(72, (width - left) / Math.max(1, columns.length));
    const y = (ns) => height - bottom - (ns / most) * (height - bottom - 8);
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.setAttribute("height", height);
    const items = [];
    for (const tick of ticks(0, most, 4)) {
      items.push(svg("line", { class: "grid", x1: left, x2: width, y1: y(tick), y2: y(tick) }), svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, duration(tick)));
    }
    const marks = columns.map((column, index) => {
      const x = left + index * pitch;
      let at = 0;
      for (const kind of DATA.kinds.filter((kind) => column.kinds.has(kind))) {
        const ns = column.kinds.get(kind);
        items.push(svg("rect", { class: `${colour(kind)}${isDim(kind) ? " dim" : ""}`, x: x + 1, y: y(at + ns), width: Math.max(1, pitch - 2), height: Math.max(0, y(at) - y(at + ns)) }));
        at += ns;
      }
      const text = column.layer === null ? (pitch > 50 ? "outside" : "—") : String(column.layer);
      if (pitch > 7 * text.length || index % Math.ceil((7 * text.length) / pitch) === 0) items.push(svg("text", { x: x + pitch / 2, y: height - 5, "text-anchor": "middle" }, text));
      const [head, rest] = words(column);
      return svg("rect", { role: "option", id: `layer-${index}`, "data-index": index, "aria-selected": "false", "aria-label": `${head}, ${rest}`, x: x + 0.5, y: 2, width: Math.max(1, pitch - 1), height: height - 4, fill: "transparent" });
    });
    chart.replaceChildren(...items, ...marks);
    picker.draw(marks);
  }
  let known = 0;
  onWidth(chart, (width) => {
    known = width;
    draw(width);
  });
  let drawn = null;
  views.push(() => {
    if (drawn !== step) {
      drawn = step;
      collect();
      picker.reset();
    }
    box.hidden = columns.every((column) => column.layer === null);
    if (known) draw(known);
  });
  return box;
}

const share = (value) => {
  const bar = h("span", { class: "k0" });
  bar.style.width = `${Math.min(100, 100 * value)}%`;
  return [percent(value), h("span", { class: "track", "aria-hidden": "true" }, bar)];
};
const rate = (value, roof) => (value === null ? "" : [digits(value / 1e9), roof ? h("div", { class: "quiet" }, percent(value / roof)) : ""]);

function dispatches() {
  const ranges = (numbers) => {
    const parts = [];
    for (const number of numbers) {
      const last = parts.at(-1);
      if (last && number === last[1] + 1) last[1] = number;
      else parts.push([number, number]);
    }
    return parts.map(([low, high]) => (low === high ? `${low}` : `${low}–${high}`)).join(", ");
  };
  const columns = [
    { label: "Dispatch", head: true, value: (row) => row.name, cell: (row) => [
      row.key === null ? row.name : h("button", { type: "button", class: "mono", onclick: () => openDispatch(row) }, breakable(row.name)),
      row.key !== null && h("span", { class: "quiet" }, swatch(row.kind), [label(row.kind), row.shape, row.note].filter(Boolean).join(" · "))] },
    { label: "Layer", value: (row) => row.layers[0], cell: (row) => ranges(row.layers) },
    { label: "Calls", numeric: true, title: "in one step", value: (row) => (row.key === null ? null : row.count), cell: (row) => (row.key === null ? "" : row.count) },
    { label: "Median", numeric: true, title: "of one dispatch, over all steps", value: (row) => row.medianNs, cell: (row) => duration(row.medianNs) },
    { label: "Min", numeric: true, value: (row) => row.minNs, cell: (row) => duration(row.minNs) },
    { label: "A step", numeric: true, title: "mean of all steps", value: (row) => row.stepNs, cell: (row) => duration(row.stepNs) },
    { label: "Share", numeric: true, value: (row) => row.share, cell: (row) => share(row.share) },
    { label: "Threads", numeric: true, title: "that were busy: time of all workgroups together by wall time", value: (row) => row.threads, cell: (row) => (row.threads === null ? "" : digits(row.threads)) },
    { label: "Workgroups", numeric: true, value: (row) => row.workgroups?.reduce((a, b) => a * b, 1), cell: (row) => row.workgroups?.join("×") },
    { label: "GB/s", numeric: true, title: "and the share of the machine's roof", value: (row) => row.bytesS, cell: (row) => rate(row.bytesS, DATA.roofs.bandwidth) },
    { label: "GFLOP/s", numeric: true, title: "and the share of the machine's roof", value: (row) => row.flopsS, cell: (row) => rate(row.flopsS, DATA.roofs.flops) },
    { label: "Passes", numeric: true, title: "that changed its IR", value: (row) => passesOf(row), cell: (row) => passesOf(row) ?? "" },
  ];
  const table = sortable({ label: "Table of dispatches", columns, rows: [], sort: 6 });
  let isBySite = false;
  const search = h("input", { type: "search", placeholder: "name, weight, op …", "aria-label": "Show only rows with these words", oninput: () => show() });
  const count = h("p", { class: "quiet", role: "status" });
  const choice = (text, value) => h("button", { class: "tool", type: "button", "aria-pressed": String(isBySite === value), onclick: () => {
    isBySite = value;
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(Boolean(index) === value)));
    show();
  } }, text);
  const buttons = [choice("By export", false), choice("By call site", true)];
  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = isBySite ? step.siteRows : step.rows;
    const rows = all.filter((row) => !isDim(row.kind) && words.every((word) => row.text.includes(word)));
    count.textContent = rows.length === all.length ? plural(all.length, "row") : `${rows.length} of ${plural(all.length, "row")}` + (chosenKind ? `, only ${label(chosenKind)}` : "");
    table.show(rows);
  }
  views.push(show);
  const box = section("Dispatches", null, table.element);
  box.querySelector("header").append(count, h("div", { class: "tools" }, ...buttons, search));
  return box;
}

function zones() {
  if (!DATA.zones.length) return null;
  const columns = [
    { label: "Zone", head: true, value: (row) => row.name, cell: (row) => [h("span", { class: "mono" }, row.name), h("span", { class: "quiet" }, row.source)] },
    { label: "Count", numeric: true, value: (row) => row.count, cell: (row) => row.count.toLocaleString("en") },
    { label: "Total", numeric: true, value: (row) => row.totalNs, cell: (row) => duration(row.totalNs) },
    { label: "Own", numeric: true, title: "without the zones inside", value: (row) => row.selfNs, cell: (row) => duration(row.selfNs) },
    { label: "Median", numeric: true, value: (row) => row.medianNs, cell: (row) => duration(row.medianNs) },
    { label: "Max", numeric: true, value: (row) => row.maxNs, cell: (row) => duration(row.maxNs) },
  ];
  const table = sortable({ label: "Table of zones", columns, rows: DATA.zones, sort: 3 });
  table.show(DATA.zones);
  return section("Zones", `What Tracy saw, host and device together${DATA.zonesLeftOut ? `; ${plural(DATA.zonesLeftOut, "smaller one")} left out` : ""}.`, table.element);
}

const passesOf = (row) => DATA.histories[row.key]?.steps.filter((step) => !step.isStage).length;
const dialog = h("dialog", { "aria-labelledby": "dispatch-title" });
function openDispatch(row, run = null) {
  const { key } = row;
  const history = DATA.histories[key] ? historyPane(key) : null;
  const reason = DATA.omitted[key] ?? DATA.noHistory;
  const site = run && step.sites[run[0]];
  dialog.replaceChildren(
    h("div", { class: "sheet" },
      h("h2", { id: "dispatch-title" }, breakable(key)),
      h("form", { method: "dialog" }, h("button", { class: "tool" }, "Close")),
      h("dl", { class: "facts" },
        site && fact("this one", describeRun(run)[1]),
        fact("kind", label(row.kind)), fact("calls a step", row.count), fact("median", duration(row.medianNs)), fact("of the step", percent(row.share)),
        fact("workgroups", (run?.[5] ?? row.workgroups)?.join("×")), row.bytes && fact("bytes", bytes(row.bytes)), row.flops && fact("operations", digits(row.flops / 1e6) + " M"),
        fact("weight", site ? site.weight : row.weight), (site?.op ?? row.op) && fact("from", h("code", {}, site?.op ?? row.op)))),
    history ? history.element : h("p", { class: "empty" }, reason));
  dialog.showModal();
  if (history) history.focus();
}

function functionChoice() {
  if (DATA.functions.length < 2) return null;
  const buttons = DATA.functions.map((candidate) => h("button", { class: "tool", type: "button", "aria-pressed": String(candidate === step), onclick: (event) => {
    step = candidate;
    chosenKind = null;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === event.currentTarget)));
    redraw();
  } }, candidate.name));
  return h("div", { class: "tools", role: "group", "aria-label": "Function" }, buttons);
}

const headline = h("h1");
const summary = h("p", { class: "summary" });
views.push(() => {
  headline.textContent = step.headline;
  summary.textContent = step.summary;
});
const above = timeline();
MAIN.append(
  h("header", {}, h("p", { class: "eyebrow" }, DATA.eyebrow), headline, summary,
    DATA.missing.map(([what, why]) => h("p", { class: "notice" }, `Missing: ${what}: ${why}`)),
    h("dl", { class: "facts" }, DATA.facts.map(([name, value]) => fact(name, value))),
    h("details", {}, h("summary", {}, "Versions and flags"), h("dl", {}, DATA.more.flatMap(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, value)]))),
    functionChoice()),
  above.box,
  h("div", { class: "columns" }, kinds(), roofline()),
  layers(above.zoomTo),
  dispatches(),
  zones() ?? "",
  dialog);
redraw();
