"""The page of one capture: its step, where the time of it went, and what the compiler made of each dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llmir_iree.tracing.capture import Capture, Site, ZoneTotal
from llmir_iree.tracing.table import TableRow, aggregate
from llmir_iree.tracing.views.page import build_page
from llmir_iree.tracing.views.pass_history import PassChange, pack_history
from llmir_iree.tracing.views.step import UNKNOWN_KIND, TypicalStep, typical_steps
from llmir_iree.tracing.views.words import digits, duration, percent, plural

_SCRIPTS = ("dom.js", "mlir.js", "history.js", "capture.js")

# Of a page, for the histories of passes; what lies above opens slowly and is sent around with reluctance.
HISTORY_BYTES = 3 << 20
_MOST_ZONES = 200
_NO_HISTORY = "What the passes made of this dispatch is not in the capture: llmir-trace record --with ir keeps it."

# By the key of the dispatch's export; each is gone through once, and only if there is room for it.
Histories = Mapping[str, Iterable[PassChange]]


def capture_page(capture: Capture, histories: Histories, history_bytes: int = HISTORY_BYTES) -> str:
    """HTML of a capture.

    Args:
        capture: with calls in it.
        histories: of the dispatches whose IR was captured; read in the order of their time, and not all of them if
            they take more than `history_bytes`.
        history_bytes: what the page may hold of them, packed. Dispatches left out are named in the page.

    Raises:
        CaptureError: a table is damaged, or there are no calls.
    """
    manifest = capture.manifest
    steps = typical_steps(capture)
    rows, places = aggregate(capture, "dispatch"), aggregate(capture, "site")
    kinds = _by_time((step.site(run).kind, run.duration_ns) for step in steps for run in step.runs)
    keys = _by_time((run.key, run.duration_ns) for step in steps for other in step.steps for run in other.runs)
    packed, omitted = _pack(histories, keys, history_bytes)
    zones = sorted(capture.read(ZoneTotal), key=lambda zone: -zone.self_ns)
    name = Path(manifest.subject).name
    macs = manifest.machine.peak_macs_s
    data = {
        "eyebrow": f"{name} · {manifest.created}",
        "facts": _facts(capture),
        "more": [*manifest.versions.items(), ("flags", " ".join(manifest.flags)), *manifest.modules.items()],
        "missing": list(manifest.missing.items()),
        "roofs": {"bandwidth": manifest.machine.bandwidth_bytes_s, "flops": 2 * macs if macs else None},
        "kinds": kinds,
        "functions": [
            _function(
                capture,
                step,
                [row for row in rows if row.function == step.function],
                [row for row in places if row.function == step.function],
            )
            for step in steps
        ],
        "histories": packed,
        "omitted": omitted,
        "noHistory": _NO_HISTORY,
        "zones": [_zone(zone) for zone in zones[:_MOST_ZONES]],
        "zonesLeftOut": max(0, len(zones) - _MOST_ZONES),
    }
    return build_page(f"{name} {manifest.phase or ''} · llmir-trace".replace("  ", " "), _SCRIPTS, data)


def _facts(capture: Capture) -> list[tuple[str, str | int | None]]:
    manifest = capture.manifest
    machine = manifest.machine
    sequences = manifest.batch_size
    return [
        ("processor", f"{machine.cpu}, {plural(machine.cores, 'core')}"),
        ("memory", f"{digits(machine.bandwidth_bytes_s / 1e9)} GB/s" if machine.bandwidth_bytes_s else None),
        ("arithmetic", f"{digits(2 * machine.peak_macs_s / 1e9)} GFLOP/s" if machine.peak_macs_s else None),
        ("device", manifest.device),
        ("target", manifest.target),
        ("batch", plural(sequences, "sequence") if sequences is not None else None),
        ("context", plural(manifest.context, "token") if manifest.context is not None else None),
        ("recorded", plural(manifest.processes, "process")),
        ("sources", ", ".join(manifest.sources)),
    ]


def _function(
    capture: Capture, step: TypicalStep, rows: Sequence[TableRow], places: Sequence[TableRow]
) -> dict[str, Any]:
    """One function: the step that is drawn, and the tables over all its steps, by export and by site."""
    numbers = sorted({number for row in places for number in row.sites})
    index = {number: position for position, number in enumerate(numbers)}
    runs = {run.site: run for other in step.steps for run in other.runs}
    keys = {number: run.key for number, run in runs.items()}
    call = step.typical.call
    medians = median(other.wall_ns for other in step.steps)
    return {
        "name": step.function,
        "headline": f"{capture.manifest.phase or step.function} takes {duration(medians)}",
        "summary": _summary(step),
        "callLabel": f"The call of median time, {duration(step.wall_ns)}: number {call.call} of process {call.process}",
        "wallNs": step.wall_ns,
        "betweenNs": step.between_ns,
        "sites": [_site(step.site(runs[number])) for number in numbers],
        "runs": [
            (
                index[run.site],
                run.start_ns - call.start_ns,
                run.duration_ns,
                run.tile_ns,
                run.tiles,
                run.workgroups,
            )
            for run in step.runs
        ],
        "rows": [{**_row(step, row, keys), "places": [index[number] for number in row.sites]} for row in rows],
        "siteRows": [_row(step, row, keys, is_site=True) for row in places],
    }


def _summary(step: TypicalStep) -> str:
    calls = plural(len(step.steps), "call")
    if not step.runs:
        return f"Median of {calls}, whose dispatches were not recorded."
    times: Counter[str] = Counter()
    for run in step.runs:
        times[step.site(run).kind] += run.duration_ns
    kind, most = times.most_common(1)[0]
    return (
        f"Median of {calls}. {plural(len(step.runs), 'dispatch')} fill {percent(1 - step.between_ns / step.wall_ns)} "
        f"of it; in the other {duration(step.between_ns)} none runs. "
        f"{percent(most / step.wall_ns)} is {kind.replace('_', ' ')}."
    )


def _site(site: Site) -> dict[str, Any]:
    return {
        "key": site.key,
        "kind": site.kind,
        "op": site.op,
        "weight": site.weight,
        "layer": site.layer,
        "shape": site.shape,
        "read": site.bytes_read,
        "written": site.bytes_written,
        "flops": site.flops,
    }


def _row(step: TypicalStep, row: TableRow, keys: Mapping[int, str], *, is_site: bool = False) -> dict[str, Any]:
    """A row of the table; the time between dispatches has no key, as there is nothing to open."""
    known = [step.sites[number] for number in row.sites if number in step.sites]
    weights = sorted({site.weight for site in known if site.weight})
    note = weights[0] if len(weights) == 1 else f"{len(weights)} weights" if weights else None
    key = keys[row.sites[0]] if row.sites else None
    name = f"{row.sites[0]} {note or key}" if is_site and row.sites else row.name
    words = (name, key, row.kind, (row.kind or "").replace("_", " "), row.shape, row.op, *weights)
    return {
        "name": name,
        "key": key,
        "kind": row.kind or UNKNOWN_KIND,
        "shape": row.shape,
        "op": row.op,
        "weight": note,
        "note": key if is_site else note,
        "layers": sorted({site.layer for site in known if site.layer is not None}),
        "count": round(row.count, 2),
        "medianNs": row.median_ns,
        "minNs": row.min_ns,
        "stepNs": row.total_ns,
        "share": row.share,
        "threads": row.parallelism,
        "workgroups": row.workgroups,
        "bytes": row.nbytes and row.nbytes / row.count,
        "flops": row.flops and row.flops / row.count,
        "bytesS": row.bandwidth,
        "flopsS": row.throughput,
        "text": " ".join(word for word in words if word).lower(),
    }


def _zone(zone: ZoneTotal) -> dict[str, Any]:
    return {
        "name": zone.name,
        "source": zone.source,
        "count": zone.count,
        "totalNs": zone.total_ns,
        "selfNs": zone.self_ns,
        "medianNs": zone.median_ns,
        "maxNs": zone.max_ns,
    }


def _pack(histories: Histories, keys: Sequence[str], limit: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The histories that fit, those of the longest dispatches first, and why each of the others is left out."""
    packed: dict[str, Any] = {}
    omitted: dict[str, str] = {}
    room = limit
    for key in keys:
        if key not in histories:
            continue
        history = pack_history(histories[key])
        if len(history.packed) > room:
            passes = sum(not step["isStage"] for step in history.steps)
            omitted[key] = (
                f"The history of its {plural(passes, 'pass')} is left out to "
                f"keep this page small; llmir-trace ir shows it."
            )
            continue
        room -= len(history.packed)
        packed[key] = history.as_data()
    return packed, omitted


def _by_time(times: Iterable[tuple[str, int]]) -> list[str]:
    """Names by the sum of their times, longest first."""
    sums: Counter[str] = Counter()
    for name, ns in times:
        sums[name] += ns
    return [name for name, _ in sums.most_common()]
