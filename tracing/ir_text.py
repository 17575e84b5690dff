"""Makes texts of modules comparable: the same names for the same values, and no attributes that say nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

_ALIAS = re.compile(r"^([#!][A-Za-z_]\w*) = ", re.MULTILINE)
_ALIAS_USE = re.compile(r"[#!][A-Za-z_]\w*(?![\w.<])")
_LOCATION = re.compile(r" loc\((?:[^()\"]|\"[^\"]*\"|\((?:[^()\"]|\"[^\"]*\"|\((?:[^()\"]|\"[^\"]*\")*\))*\))*\)")
# A value, or a block, by its name: `%arg0`, `%12#1`, `^bb3`.
_VALUE = re.compile(r"%[\w$.-]+|\^bb\d+")
_PREFIX = re.compile(r"[#!][A-Za-z_]\w*(?:\.\w+)*<")
_MAP = re.compile(r"affine_(?:map|set)<")
_TARGET_ATTRIBUTE = re.compile(
    r"\b(cpu_features|cpu|target-cpu|target-features|tune_cpu|target_features|target_cpu) = "
    r"(?:\"[^\"]*\"|#llvm\.target_features<\[[^\]]*\]>)"
)
_PASSTHROUGH = re.compile(r"\[\"(target-cpu|target-features|tune-cpu)\", \"[^\"]*\"\]")
# The configuration of a target: `<"llvm-cpu", "embedded-elf-x86_64", {cpu = ..., native_vector_size = 64 : i64}>`.
_TARGET = re.compile(r"(<\"[\w-]+\", \"[\w.-]+\"), \{(?:[^{}\"]|\"[^\"]*\"|\{(?:[^{}\"]|\"[^\"]*\")*\})*\}>")
# Bytes of a constant, such as those of a tuning spec that iree-compile hangs on a module.
_BYTES = re.compile(r'(dense<"0x[0-9A-F]{16})[0-9A-F]{16,}"')
_HUGE_FUNCTION_LINES = 4000


def parse_aliases(text: str) -> dict[str, str]:
    """What the lines in front of a module, such as `#map = affine_map<...>`, define; definitions hold no aliases."""
    pieces = _ALIAS.split(text)
    aliases: dict[str, str] = {}
    # An alias uses only those above it.
    for name, value in zip(pieces[1::2], pieces[2::2], strict=True):
        if not name.startswith("#loc"):
            aliases[name] = inline_aliases(value.strip(), aliases)
    return aliases


def inline_aliases(text: str, aliases: Mapping[str, str]) -> str:
    """A text with aliases replaced by what they stand for."""
    if not aliases:
        return text
    return _ALIAS_USE.sub(lambda match: aliases.get(match[0], match[0]), text)


def strip_locations(text: str) -> str:
    """A text without `loc(...)`."""
    return _LOCATION.sub("", text) if " loc(" in text else text


def strip_prefixes(text: str) -> str:
    """A text without the names of attributes and types that MLIR leaves out where the op already tells them."""
    return _MAP.sub("<", _PREFIX.sub("<", text))


def mask_target(text: str) -> str:
    """A text that does not tell for which processor it is compiled."""
    text = _TARGET.sub(r"\1, {...}>", text)
    return _PASSTHROUGH.sub(r'["\1", "..."]', _TARGET_ATTRIBUTE.sub(r'\1 = "..."', text))


def target_attributes(text: str) -> dict[str, str]:
    """What `mask_target` masks: the first of each."""
    found: dict[str, str] = {}
    for match in _TARGET_ATTRIBUTE.finditer(text):
        found.setdefault(match[1], match[0].partition(" = ")[2].strip('"'))
    return found


def renumber(text: str) -> str:
    """A text whose values and blocks are numbered in the order in which they come."""
    names: dict[str, str] = {}
    return _VALUE.sub(lambda match: names.setdefault(match[0], f"{match[0][0]}{len(names)}"), text)


def mask_values(text: str) -> str:
    """A text in which all values have one name."""
    return _VALUE.sub(lambda match: match[0][0], text)


def normalise(text: str) -> str:
    """A text that is equal to another's whenever two modules differ in nothing but names and processor."""
    return renumber(mask_target(strip_prefixes(strip_locations(text))))


def unified_diff(before: str, after: str, context: int = 3, names: tuple[str, str] = ("before", "after")) -> str:
    """What changed, in the format of `diff -u`; lines that differ in the names of values alone count as equal.

    If nothing else differs, they count. Empty if the texts are equal, apart from the numbering of values.
    """
    lines_a, lines_b = before.splitlines(), after.splitlines()
    for same in (mask_values, str):
        text_a, text_b = (before, after) if same is mask_values else (renumber(before), renumber(after))
        keys_a, keys_b = (_PREFIX.sub("<", same(text)).splitlines() for text in (text_a, text_b))
        opcodes = list(_opcodes(keys_a, keys_b))
        if any(tag != "equal" for tag, *_ in opcodes):
            return "\n".join(_render(lines_a, lines_b, opcodes, context, names))
    return ""


def count_changes(diff: str) -> tuple[int, int]:
    """Lines added and lines removed by a unified diff."""
    lines = diff.splitlines()[2:]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def head_of_diff(diff: str, lines: int = 40) -> str:
    """The beginning of a unified diff, without its header, no longer than so many lines."""
    body = [shorten(line) for line in diff.splitlines()[2:]]
    return "\n".join([*body[:lines], f"... {len(body) - lines} lines more"] if len(body) > lines else body)


def shorten(line: str, columns: int = 400) -> str:
    """A line that is no longer than so many columns: of a constant's bytes and of its middle, much is left out."""
    line = _BYTES.sub(r'\1..."', line)
    return line if len(line) <= columns else f"{line[: columns // 2]} ... {line[-columns // 2 + 5 :]}"


_Opcode = tuple[str, int, int, int, int]


def _opcodes(keys_a: Sequence[str], keys_b: Sequence[str]) -> Iterator[_Opcode]:
    """As difflib's, whose time grows with the square of the length, without what is equal at both ends."""
    shorter = min(len(keys_a), len(keys_b))
    head = next((index for index in range(shorter) if keys_a[index] != keys_b[index]), shorter)
    rest = shorter - head
    tail = next((index for index in range(rest) if keys_a[-1 - index] != keys_b[-1 - index]), rest)
    middle_a, middle_b = keys_a[head : len(keys_a) - tail], keys_b[head : len(keys_b) - tail]
    if head:
        yield "equal", 0, head, 0, head
    # Lines that come often would be tried against each other.
    is_huge = max(len(middle_a), len(middle_b)) > _HUGE_FUNCTION_LINES
    matcher = difflib.SequenceMatcher(a=middle_a, b=middle_b, autojunk=is_huge)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        yield tag, i1 + head, i2 + head, j1 + head, j2 + head
    if tail:
        yield "equal", len(keys_a) - tail, len(keys_a), len(keys_b) - tail, len(keys_b)


def _render(
    lines_a: Sequence[str], lines_b: Sequence[str], opcodes: Sequence[_Opcode], context: int, names: tuple[str, str]
) -> Iterator[str]:
    yield f"--- {names[0]}"
    yield f"+++ {names[1]}"
    for group in _groups(opcodes, context):
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        yield f"@@ -{i1 + 1},{i2 - i1} +{j1 + 1},{j2 - j1} @@"
        for tag, a1, a2, b1, b2 in group:
            if tag == "equal":
                yield from (f" {line}" for line in lines_b[b1:b2])
            else:
                yield from (f"-{line}" for line in lines_a[a1:a2])
                yield from (f"+{line}" for line in lines_b[b1:b2])


def _groups(opcodes: Sequence[_Opcode], context: int) -> Iterator[list[_Opcode]]:
    group: list[_Opcode] = []
    for index, (tag, i1, i2, j1, j2) in enumerate(opcodes):
        if tag != "equal":
            group.append((tag, i1, i2, j1, j2))
            continue
        is_last = index == len(opcodes) - 1
        if group and (is_last or i2 - i1 > 2 * context):
            group.append((tag, i1, min(i1 + context, i2), j1, min(j1 + context, j2)))
            yield group
            group = []
        elif group:
            group.append((tag, i1, i2, j1, j2))
            continue
        if not is_last:
            start = max(i2 - context, i1)
            group = [(tag, start, i2, j2 - (i2 - start), j2)]
    if any(tag != "equal" for tag, *_ in group):
        yield group
