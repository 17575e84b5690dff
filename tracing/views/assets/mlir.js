// Colours MLIR line by line, and LLVM IR and assembly with the same few rules: enough for the eye, no grammar.

const MLIR = new RegExp(
  [
    String.raw`(?<comment>(?:\/\/|;).*$)`,
    String.raw`(?<string>"(?:[^"\\]|\\.)*"?)`,
    String.raw`(?<ssa>%[\w$.#-]+)`,
    String.raw`(?<symbol>@(?:"[^"]*"|[\w$.-]+))`,
    String.raw`(?<op>#[A-Za-z_][\w$.]*|\b[a-z_][\w$]*(?:\.[a-z_][\w$]*)+\b)`,
    String.raw`(?<type>![\w$.]+|\b(?:memref|tensor|vector|index|none|tuple|[su]?i\d+|f\d+(?:E\d+M\d+\w*)?|bf16|tf32|x[su]?i\d+|xf\d+)\b)`,
    String.raw`(?<number>\b(?:0x[0-9A-Fa-f]+|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\b)`,
  ].join("|"),
  "g",
);

// Pairs of a class, or null, and a piece of the line; together they are the line.
function tokens(line) {
  const result = [];
  let end = 0;
  for (const match of line.matchAll(MLIR)) {
    if (match.index > end) result.push([null, line.slice(end, match.index)]);
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    result.push([`t-${kind}`, match[0]]);
    end = match.index + match[0].length;
  }
  if (end < line.length) result.push([null, line.slice(end)]);
  return result;
}

const LONG_STRING = 120;

// The line's pieces as nodes; those between `from` and `to` are marked. If it may be short, the middle of long strings,
// such as the features of a processor, is left out.
function coloured(line, isShort, from = 0, to = 0) {
  const nodes = [];
  const brief = (text) => (text.length > LONG_STRING && text.endsWith("\"") ? [text.slice(0, 40), h("i", {}, ` … ${text.length - 60} characters … `), text.slice(-20)] : text);
  const piece = (kind, text) => (kind ? h("span", { class: kind }, isShort && kind === "t-string" ? brief(text) : text) : document.createTextNode(text));
  // A line of megabytes, as of a constant, would take the browser longer to colour than anyone reads.
  if (line.length > 4000) return [document.createTextNode(`${line.slice(0, 4000)} … ${plural(line.length - 4000, "more character")}`)];
  let at = 0;
  for (const [kind, text] of tokens(line)) {
    const cuts = [0, from - at, to - at, text.length].map((cut) => Math.min(text.length, Math.max(0, cut)));
    for (let part = 0; part < 3; part++) {
      const inner = text.slice(cuts[part], cuts[part + 1]);
      if (inner) nodes.push(part === 1 ? h("mark", {}, piece(kind, inner)) : piece(kind, inner));
    }
    at += text.length;
  }
  return nodes;
}

// Where two lines differ: ends of what they share at the start, and starts of what they share at the end.
function difference(before, after) {
  const most = Math.min(before.length, after.length);
  let start = 0;
  while (start < most && before[start] === after[start]) start++;
  let tail = 0;
  while (tail < most - start && before[before.length - 1 - tail] === after[after.length - 1 - tail]) tail++;
  // Lines that share little are another line, not a changed one.
  if (start + tail < 0.3 * Math.max(before.length, after.length)) return null;
  return [start, before.length - tail, after.length - tail];
}
