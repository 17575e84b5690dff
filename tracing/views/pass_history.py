"""Packs what the compiler made of a dispatch into a page: each text as its edits of the one before it, then deflated.

Whole texts would come to megabytes for a dispatch; their edits, deflated, to a hundredth of that.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain
from typing import Any

from llmir_iree.tracing.capture import Capture, CaptureError
from llmir_iree.tracing.ir_history import IrDump, IrHistory
from llmir_iree.tracing.ir_text import mask_values, strip_locations
from llmir_iree.tracing.machine_code import find_assembly, find_llvm

# First line, lines removed from there, lines that stand there now, and whether they differ in names of values alone.
Edit = tuple[int, int, list[str], bool]

# Above so many lines, those that come often are not tried against each other, which takes time that grows as a square.
_LONG = 2000


# Of LLVM IR and of assembly, which a dispatch that was unrolled may have many of.
_MOST_LINES = 4000


@dataclass(frozen=True)
class PassChange:
    """What one pass did, or what the dispatch was at a stage behind the passes.

    Attributes:
        name: of the pass, or of the stage.
        level: the op that it ran on.
        parts: those of the dispatch that it changed, such as its function, with their text; None for one that is gone.
        is_stage: whether it is a stage, whose one part is the whole of what there is.
    """

    name: str
    level: str
    parts: Mapping[str, str | None]
    is_stage: bool = False


@dataclass(frozen=True)
class PackedHistory:
    """A history as a page holds it.

    Attributes:
        steps: for each pass or stage its name, level, and how many lines it added and removed.
        packed: base64 of deflated JSON: for each pass a list of parts, each with its name, the number of the pass
            whose text of it was edited or -1, and its `Edit`s, first to last.
    """

    steps: list[dict[str, Any]]
    packed: str

    def as_data(self) -> dict[str, Any]:
        """For the page's data."""
        return {"steps": self.steps, "packed": self.packed}


def capture_histories(capture: Capture) -> dict[str, Iterable[PassChange]]:
    """What the compiler did to each dispatch of a capture, by its exports, read when gone through; empty without IR.

    Behind the passes stand LLVM IR and assembly, as far as the capture holds them.

    Raises:
        CaptureError: the IR is damaged.
    """
    if not capture.has_passes:
        return {}
    histories = IrDump.open(capture.folder).dispatches
    return {
        export: chain(read_changes(history), read_stages(capture, export))
        for history in histories
        for export in history.exports
    }


def read_changes(history: IrHistory) -> Iterator[PassChange]:
    """What each pass of a history did, without locations.

    Raises:
        CaptureError: a file of the IR is gone.
    """
    for step in history.steps:
        parts = {
            name: strip_locations(step.parts[name].read()) if name in step.parts else None
            for name in step.changed_parts
        }
        yield PassChange(step.pass_name, step.level, parts)


def read_stages(capture: Capture, export: str) -> Iterator[PassChange]:
    """LLVM IR and assembly of a dispatch; neither, where the machine code was made in another way than by LLVM."""
    for name, option, find in (("LLVM IR", "llvm", find_llvm), ("Assembly", "asm", find_assembly)):
        with suppress(CaptureError):
            lines = find(capture.ir, (export,)).splitlines()
            if len(lines) > _MOST_LINES:
                rest = f"... {len(lines) - _MOST_LINES} lines more: llmir-trace ir --stage {option} shows them"
                lines = [*lines[:_MOST_LINES], rest]
            yield PassChange(name, "what LLVM made of it", {name: "\n".join(lines)}, is_stage=True)


def pack_history(changes: Iterable[PassChange]) -> PackedHistory:
    """Pack what the passes did, in their order, and the stages behind them."""
    latest: dict[str, tuple[int, str]] = {}
    steps = []
    packed = []
    for number, change in enumerate(changes):
        parts = []
        added = removed = 0
        for name, text in change.parts.items():
            base, before = latest.get(name, (-1, ""))
            edits = line_edits(before, text or "")
            latest[name] = number, text or ""
            added += sum(len(lines) for _, _, lines, is_quiet in edits if not is_quiet)
            removed += sum(count for _, count, _, is_quiet in edits if not is_quiet)
            parts.append((name, base, edits))
        lines = {"added": added, "removed": removed}
        steps.append({"pass": change.name, "level": change.level, "isStage": change.is_stage, **lines})
        packed.append(parts)
    deflated = zlib.compress(json.dumps(packed, separators=(",", ":")).encode(), level=9)
    return PackedHistory(steps, base64.b64encode(deflated).decode())


def line_edits(before: str, after: str) -> list[Edit]:
    """What turns a text into another, first to last, lines counted from 0.

    Lines are matched without the names of values, which a pass gives anew below every op that it adds. Those that
    match but differ are edits as well, quiet ones unless there are no others.
    """
    old, new = before.splitlines(), after.splitlines()
    keys = [mask_values(text).splitlines() for text in (before, after)]
    edits = list(_edits(old, new, *keys))
    return edits if any(not edit[3] for edit in edits) else [(*edit[:3], False) for edit in edits]


def _edits(old: list[str], new: list[str], old_keys: list[str], new_keys: list[str]) -> Iterator[Edit]:
    for tag, first, last, new_first, new_last in _matches(old_keys, new_keys):
        if tag != "equal":
            yield first, last - first, new[new_first:new_last], False
            continue
        start = None
        for index in range(last - first + 1):
            differs = index < last - first and old[first + index] != new[new_first + index]
            if differs and start is None:
                start = index
            elif not differs and start is not None:
                yield first + start, index - start, new[new_first + start : new_first + index], True
                start = None


def _matches(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """As `SequenceMatcher.get_opcodes`, quick where most is equal at both ends, as after most passes."""
    shared = min(len(old), len(new))
    head = next((index for index in range(shared) if old[index] != new[index]), shared)
    shared -= head
    tail = next((index for index in range(shared) if old[-1 - index] != new[-1 - index]), shared)
    middle = old[head : len(old) - tail], new[head : len(new) - tail]
    yield "equal", 0, head, 0, head
    matcher = SequenceMatcher(None, *middle, autojunk=max(map(len, middle)) > _LONG)
    for tag, first, last, new_first, new_last in matcher.get_opcodes():
        yield tag, first + head, last + head, new_first + head, new_last + head
    yield "equal", len(old) - tail, len(old), len(new) - tail, len(new)
