"""Counts the dispatches of a module at IREE's stream level, function by function.

That is what a call runs one after the other, but for what the compiler lets run side by side: at this level
(`--compile-to=stream`) dispatches are formed, shared and stripped of duplicates, and none are added later.
"""

from __future__ import annotations

from collections import Counter

from iree.compiler import ir

from llmir_iree.tracing.stream_copies import walk

_DISPATCH = "stream.cmd.dispatch"


def count_dispatches(stream_ir: str) -> dict[str, Counter[str]]:
    """How often each function dispatches each executable; functions that dispatch nothing are left out.

    Args:
        stream_ir: what `iree-compile --compile-to=stream` printed.
    """
    counts: dict[str, Counter[str]] = {}
    with ir.Context():
        for function in ir.Module.parse(stream_ir).body.operations:
            for operation in walk(function.operation):
                if operation.name == _DISPATCH:
                    name = ir.StringAttr(function.operation.attributes["sym_name"]).value
                    entry = str(operation.attributes["entry_points"]).strip("[]@").partition("::")[0]
                    counts.setdefault(name, Counter())[entry] += 1
    return counts
