"""The page of a comparison: the result in a sentence, what each part adds, and where two compilations part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from llmir_iree.tracing.capture import CaptureManifest
from llmir_iree.tracing.diff import CaptureDiff, Change, DiffRow, FunctionDiff
from llmir_iree.tracing.explain import Explanation
from llmir_iree.tracing.ir_configs import LoweringConfig, pair_configs
from llmir_iree.tracing.views.page import build_page

_SCRIPTS = ("dom.js", "mlir.js", "history.js", "diff.js")


def diff_page(diff: CaptureDiff, explanations: Sequence[Explanation] = ()) -> str:
    """HTML of a comparison, with what explains its rows in the order given."""
    names = [Path(manifest.subject).name for manifest in (diff.a, diff.b)]
    data = {
        "eyebrow": f"A {names[0]} · {diff.a.created}   →   B {names[1]} · {diff.b.created}",
        "functions": [_function(function) for function in diff.functions],
        "notes": diff.notes,
        "sides": _sides(diff.a, diff.b),
        "explanations": [_explanation(explanation) for explanation in explanations],
        "histories": {},
    }
    return build_page(f"{names[0]} and {names[1]} · llmir-trace", _SCRIPTS, data)


def _function(function: FunctionDiff) -> dict[str, Any]:
    return {
        "name": function.function,
        "summary": function.summary(),
        "processes": function.processes,
        "aNs": function.a_ns,
        "bNs": function.b_ns,
        # What is taken out of the parts that the page adds up.
        "drift": None if function.took_turns else function.drift,
        "change": _change(function.change),
        "rows": [_row(row) for row in function.rows],
    }


def _row(row: DiffRow) -> dict[str, Any]:
    exports = sorted({place.key for match in row.matches for place in (match.a, match.b) if place is not None})
    return {
        "label": row.label,
        "detail": row.detail,
        "side": row.side,
        "aNs": row.a_ns,
        "bNs": row.b_ns,
        "deltaNs": row.delta_ns,
        "share": row.share,
        "change": _change(row.change),
        "exports": exports,
    }


def _change(change: Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {
        "ratio": change.ratio,
        "low": change.low,
        "high": _finite(change.high),
        "floor": _finite(change.floor),
        "isCalled": bool(change.is_called),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity, which what varies wildly in few processes may come to."""
    return value if isfinite(value) else None


def _sides(a: CaptureManifest, b: CaptureManifest) -> list[tuple[str, str, str]]:
    """What was recorded on either side, line by line."""
    lines = [("subject", a.subject, b.subject), ("recorded", a.created, b.created)]
    lines += [("processes", str(a.processes), str(b.processes)), ("target", a.target or "", b.target or "")]
    lines += [("device", a.device, b.device), ("processor", a.machine.cpu, b.machine.cpu)]
    lines += [("flags", " ".join(a.flags), " ".join(b.flags))]
    versions = {**a.versions, **b.versions}
    return lines + [(name, a.versions.get(name, ""), b.versions.get(name, "")) for name in versions]


def _explanation(explanation: Explanation) -> dict[str, Any]:
    found = explanation.divergence
    return {
        "label": explanation.row.label,
        "reason": explanation.reason,
        "hunk": found.hunk.splitlines() if found else [],
        "onlyA": _names(found.only_a) if found else [],
        "onlyB": _names(found.only_b) if found else [],
        "configs": _configs(found.configs_a, found.configs_b) if found else [],
    }


def _names(passes: Sequence[str]) -> list[str]:
    """Passes by name, once each, with how often they ran."""
    return [name if count == 1 else f"{name} ({count} times)" for name, count in Counter(passes).items()]


def _configs(a: Sequence[LoweringConfig], b: Sequence[LoweringConfig]) -> list[tuple[str, str, str]]:
    """Decisions on either side, row by row."""
    return [(op, ours.text if ours else "", theirs.text if theirs else "") for op, ours, theirs in pair_configs(a, b)]
