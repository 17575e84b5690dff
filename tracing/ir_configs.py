"""Reads from a dispatch's text how the compiler decided to lower it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_CONFIG = re.compile(r"(lowering_config|translation_info) = (?=#)")
_OP = re.compile(r"^\s*(?:%[^=]*= )?\"?([a-z_]\w*(?:\.[\w.]+)+)")
_FIELD = re.compile(r"(\w+) = (\[(?:[^\[\]]|\[[^\[\]]*\])*\]|[\w#.]+(?:<[^<>]*>)?)")
_CLOSING = {"<": ">", "[": "]", "{": "}", "(": ")"}
_MOST_CHANGES = 4


@dataclass(frozen=True, slots=True)
class LoweringConfig:
    """A decision: which op it is about, such as "linalg.matmul", and the attribute that holds it."""

    op: str
    text: str

    @property
    def fields(self) -> dict[str, str]:
        """What the attribute sets, such as tile sizes of each level, and the pipeline."""
        return dict(_FIELD.findall(self.text.partition("<")[2]))


def find_configs(text: str) -> tuple[LoweringConfig, ...]:
    """Decisions that stand in a text, in its order."""
    return tuple(_find(text))


def pair_configs(
    a: Sequence[LoweringConfig], b: Sequence[LoweringConfig]
) -> list[tuple[str, LoweringConfig | None, LoweringConfig | None]]:
    """Decisions on either side, op by op: the n-th about an op in A beside the n-th in B, None where there is none."""
    ours, theirs = _by_op(a), _by_op(b)
    return [(key[0], ours.get(key), theirs.get(key)) for key in dict.fromkeys([*ours, *theirs])]


def describe_changes(before: Sequence[LoweringConfig], after: Sequence[LoweringConfig]) -> str:
    """What differs between two lists of decisions, in words; empty if nothing does.

    Such as "tile sizes of linalg.matmul: distribution [8, 64, 0] -> [8, 16, 0]". That which says most comes first.
    """
    changes = []
    for _, old, new in pair_configs(before, after):
        if old is None or new is None:
            continue
        fields = [
            f"{name} {old.fields.get(name, 'unset')} -> {new.fields.get(name, 'unset')}"
            for name in dict.fromkeys([*old.fields, *new.fields])
            if old.fields.get(name) != new.fields.get(name)
        ]
        if fields:
            has_tiles = "[" in old.text + new.text
            changes.append(f"{'tile sizes' if has_tiles else 'pipeline'} of {new.op}: {', '.join(fields)}")
    changes.sort(key=len, reverse=True)
    return "; ".join(dict.fromkeys(changes[:_MOST_CHANGES]))


def _find(text: str) -> Iterator[LoweringConfig]:
    for line in text.splitlines():
        for match in _CONFIG.finditer(line):
            op = _OP.match(line)
            yield LoweringConfig(op[1] if op else "?", line[match.end() : _end_of_value(line, match.end())])


def _end_of_value(line: str, begin: int) -> int:
    depth: list[str] = []
    for index in range(begin, len(line)):
        character = line[index]
        if character in _CLOSING:
            depth.append(_CLOSING[character])
        elif depth and character == depth[-1] and line[index - 1] != "-":
            depth.pop()
            if not depth:
                return index + 1
        elif not depth and character in ",} ":
            return index
    return len(line)


def _by_op(configs: Sequence[LoweringConfig]) -> dict[tuple[str, int], LoweringConfig]:
    seen: Counter[str] = Counter()
    numbered = {}
    for config in configs:
        numbered[config.op, seen[config.op]] = config
        seen[config.op] += 1
    return numbered
