"""Sums up the zones of a Tracy file by name and location."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmir_iree.tracing.capture import ZoneTotal
from llmir_iree.tracing.tracy_zones import TracyFile, Zones


def total_zones(trace: TracyFile, process: int) -> list[ZoneTotal]:
    """Zones that have ended, summed up by name and location, the largest sums first.

    Args:
        trace: what was read of the file.
        process: number of the recorded process, for the rows.
    """
    totals = list(_totals(trace, trace.cpu_zones, process, ""))
    for row, context in enumerate(trace.gpu_contexts):
        of_context = trace.gpu_zones.take(trace.gpu_zones.thread == row)
        totals += _totals(trace, of_context, process, f"{context.name}, ")
    return sorted(totals, key=lambda total: (-total.total_ns, total.name, total.source))


def _totals(trace: TracyFile, zones: Zones, process: int, where: str) -> Iterator[ZoneTotal]:
    zones = zones.take(zones.has_ended)
    if not len(zones):
        return
    kind = zones.name.astype(np.int64) * len(trace.locations) + zones.location
    duration = zones.duration_ns
    order = np.lexsort((duration, kind))
    kind, duration, self_ns = kind[order], duration[order], zones.self_ns[order]
    first = np.flatnonzero(np.diff(kind, prepend=-1))
    counts = np.diff(first, append=len(kind))
    last = first + counts - 1
    # Of an even number the mean of the two in the middle.
    median = (duration[first + (counts - 1) // 2] + duration[first + counts // 2]) // 2
    names, locations = np.divmod(kind[first], len(trace.locations))
    columns = (
        names,
        locations,
        counts,
        np.add.reduceat(duration, first),
        np.add.reduceat(self_ns, first),
        duration[first],
        median,
        duration[last],
    )
    for name, location, count, total, own, least, middle, most in zip(*(c.tolist() for c in columns), strict=True):
        yield ZoneTotal(
            process=process,
            name=trace.names[name],
            source=f"{where}{trace.locations[location]}",
            count=count,
            total_ns=total,
            self_ns=own,
            min_ns=least,
            median_ns=middle,
            max_ns=most,
        )
