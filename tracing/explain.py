"""Leads from what changed between two captures to the compiler pass that changed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmir_iree.tracing.capture import Capture, CaptureError
from llmir_iree.tracing.diff import CaptureDiff, DiffRow, only_in
from llmir_iree.tracing.ir_compare import Divergence, compare, compare_programs
from llmir_iree.tracing.ir_configs import describe_changes
from llmir_iree.tracing.ir_history import IrDump, IrHistory
from llmir_iree.tracing.match import Match, Place

# Rows are explained until so much of all that changed is, and no more than so many.
_ENOUGH = 0.9
_MOST_ROWS = 5


@dataclass(frozen=True)
class Explanation:
    """Why a row changed.

    Attributes:
        function: that the row is of.
        row: what changed.
        divergence: where the compiler's work on its dispatches parts, None where that is not known.
        reason: the same in a line, or why it is not known.
    """

    function: str
    row: DiffRow
    divergence: Divergence | None
    reason: str

    def lines(self) -> list[str]:
        """The reason, and below it the hunk."""
        return [self.reason, *(self.divergence.hunk.splitlines() if self.divergence else ())]


def explain(diff: CaptureDiff, a: Capture, b: Capture) -> list[Explanation]:
    """Find the first diverging pass of the rows that are called and explain most of the change, largest first.

    Args:
        diff: of the two captures, by dispatch or by site.
        a: the first one, recorded with its IR.
        b: the second one, likewise.

    Raises:
        CaptureError: a capture was recorded without IR, or it is damaged.
    """
    dumps = _Dumps(IrDump.open(a.folder), IrDump.open(b.folder), _describe_inputs(a, b))
    return [
        Explanation(function.function, row, *_reason(row, dumps))
        for function in diff.functions
        for row in _worth_explaining(function.rows)
    ]


def add_details(diff: CaptureDiff, explanations: Sequence[Explanation]) -> CaptureDiff:
    """The same comparison, its rows told with what the compiler chose otherwise, such as other tile sizes."""
    # What says most comes first, and is enough here.
    details = {
        (found.function, found.row.matches): describe_changes(
            found.divergence.configs_a, found.divergence.configs_b
        ).partition("; ")[0]
        for found in explanations
        if found.divergence is not None
    }
    functions = (
        replace(function, rows=tuple(_add_detail(row, function.function, details) for row in function.rows))
        for function in diff.functions
    )
    return replace(diff, functions=tuple(functions))


def _add_detail(row: DiffRow, function: str, details: Mapping[tuple[str, tuple[Match, ...]], str]) -> DiffRow:
    parts = (row.detail, details.get((function, row.matches), ""))
    return replace(row, detail=", ".join(part for part in parts if part))


def _worth_explaining(rows: Sequence[DiffRow]) -> Iterator[DiffRow]:
    changed = [row for row in rows if row.matches and (row.is_called or row.side != "both")][:_MOST_ROWS]
    whole = sum(abs(row.delta_ns) for row in changed)
    explained = 0.0
    for row in changed:
        if explained >= _ENOUGH * whole:
            return
        explained += abs(row.delta_ns)
        yield row


@dataclass(frozen=True)
class _Dumps:
    a: IrDump
    b: IrDump
    inputs: str

    @cached_property
    def between_programs(self) -> Divergence | None:
        """Of the programs around all dispatches."""
        return compare_programs(self.a, self.b)


def _reason(row: DiffRow, dumps: _Dumps) -> tuple[Divergence | None, str]:
    place_a, place_b = row.matches[0].a, row.matches[0].b
    if place_a is None or place_b is None:
        return _reason_before_dispatches(f"only {row.side.upper()} has this dispatch", dumps)
    if row.matches[0].basis != "export":
        return _reason_before_dispatches("other dispatches do this work", dumps)
    try:
        found = compare(_find(dumps.a, place_a), _find(dumps.b, place_b))
    except CaptureError as error:
        return None, str(error)
    return found, _summary(found)


def _reason_before_dispatches(what: str, dumps: _Dumps) -> tuple[Divergence | None, str]:
    """Why programs are cut into other dispatches: what iree-compile was given, or one of its passes."""
    if dumps.inputs:
        return None, f"{what}: {dumps.inputs}"
    found = dumps.between_programs
    if found is None:
        return None, f"{what}: the dumps do not tell why; they hold no pass over the whole program, or no difference"
    return found, f"{what}: the programs {found.summary()}"


def _describe_inputs(a: Capture, b: Capture) -> str:
    """What is different about the modules that iree-compile was given; empty if nothing is or it is not known."""
    ours, theirs = only_in(a.manifest.passes, b.manifest.passes)
    ran = [f"only {side} ran {', '.join(names)}" for side, names in (("A", ours), ("B", theirs)) if names]
    if ran:
        return f"first parts at the passes of the plugin: {', '.join(ran)}"
    texts = [capture.ir / "portable.mlir" for capture in (a, b)]
    if all(text.is_file() for text in texts) and texts[0].read_bytes() != texts[1].read_bytes():
        return "what iree-compile was given is different: see ir/portable.mlir of both captures"
    return ""


def _summary(divergence: Divergence | None) -> str:
    if divergence is None:
        return "are the same after every pass: the cause is not in the compiler"
    return divergence.summary()


def _find(dump: IrDump, place: Place) -> IrHistory:
    """The history of a place's dispatch: executables may share the name of an export."""
    found = [history for history in dump.dispatches if place.key in history.names]
    if not found:
        raise CaptureError(f"{dump.source}: its IR holds no dispatch {place.key}")
    if place.facts is not None:
        executable = place.facts.executable
        found = [history for history in found if history.executable == executable] or found
    return found[0]
