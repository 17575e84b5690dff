"""Reads the profiles that IREE's tools write (`.ireeprof`), through IREE's own `iree-profile`.

The file has no specification but its reader; `iree-profile export` gives its rows in a form with a version, which is
checked. Of a CPU these are events of the host: one for every dispatch, with its wall time and the time of its
workgroups on all threads. Where a driver times dispatches on the device instead, those times are taken, in the host's
clock; what the workgroups took there is not known, and counted as the wall time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llmir_iree.tracing.capture import Call, CaptureError, DispatchRun
from llmir_iree.tracing.children import run_child, runtime_tool

EXPORT_SCHEMA = 15
_EXPORT_FORMAT = "ireeperf-jsonl"

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Profile:
    """What one process did: its calls in order, and their dispatches in the order in which they were recorded.

    Attributes:
        submissions: command buffers that a call executes, one after the other.
        invalid: dispatches that the runtime could not time; they are not among `runs`.
    """

    calls: tuple[Call, ...]
    runs: tuple[DispatchRun, ...]
    submissions: int
    invalid: int


@dataclass(frozen=True)
class KeyTotal:
    """`iree-profile`'s own sums over all dispatches of one export."""

    count: int
    total_ns: int
    tile_ns: int
    tiles: int


@dataclass(frozen=True)
class EntryPoint:
    """A function of an executable: its ordinal there, and what a dispatch of it is passed."""

    ordinal: int
    bindings: int
    constants: int


def read_ireeprof(
    file: Path, *, process: int, function: str, calls: int | None = None, timeout_s: float = _TIMEOUT_S
) -> Profile:
    """Read the calls and dispatches of a profile.

    Args:
        file: one that `--device_profiling_output` wrote, with the data families "queue-events" and "host-execution".
        process: number for the rows.
        function: the only one that was called; the file itself does not name it.
        calls: how often it was called. Where submissions do not divide into so many calls, as they may if the function
            branches, or where this is not known, each submission is taken for a call.
        timeout_s: deadline of `iree-profile`.

    Raises:
        CaptureError: truncated, not a profile, of another schema, or without dispatches of the host.
    """
    rows = _export(file, timeout_s)
    events = [row for row in rows if row["record_type"] == "host_execution_event"]
    events += [_of_device(row) for row in rows if row["record_type"] == "dispatch_event"]
    dispatches = [row for row in events if row["op"] == "dispatch"]
    if not dispatches:
        raise CaptureError(
            f"{file}: it holds no dispatches; record with --device_profiling_mode=queue-events,host-execution,"
            "executable-metadata on local-task or local-sync, with dispatch-events where another driver has them"
        )
    queued = [row for row in rows if row["record_type"] == "queue_event"]
    executions = sorted(
        {row["submission_id"] for row in (*queued, *dispatches) if row["op"] in ("execute", "dispatch")}
    )
    per_call = len(executions) // calls if calls and len(executions) % calls == 0 else 1
    call_of = {submission: index // per_call for index, submission in enumerate(executions)}
    spans = _Spans(len(executions) // per_call)
    spans.add_submissions(queued, call_of, last_of_calls=set(executions[per_call - 1 :: per_call]))
    for row in events:
        spans.add(call_of.get(row["submission_id"]), row["start_host_time_ns"], row["end_host_time_ns"])
    return Profile(
        calls=tuple(
            Call(process=process, call=index, function=function, start_ns=start, wall_ns=end - start)
            for index, (start, end) in enumerate(spans.bounds)
        ),
        runs=tuple(_runs([row for row in dispatches if row["valid"]], call_of, process, function)),
        submissions=per_call,
        invalid=sum(not row["valid"] for row in dispatches),
    )


def read_entry_points(file: Path, *, timeout_s: float = _TIMEOUT_S) -> dict[str, set[EntryPoint]]:
    """The functions of all executables by name; several if executables have functions of one name.

    Raises:
        CaptureError: truncated or not a profile.
    """
    points: dict[str, set[EntryPoint]] = {}
    for row in _export(file, timeout_s):
        if row["record_type"] == "executable_function":
            point = EntryPoint(row["function_ordinal"], row["binding_count"], row["constant_count"])
            points.setdefault(row["name"], set()).add(point)
    return points


def read_totals(file: Path, *, timeout_s: float = _TIMEOUT_S) -> dict[str, KeyTotal]:
    """`iree-profile dispatch`'s sums, export by export: what the rows of `read_ireeprof` have to add up to.

    Raises:
        CaptureError: truncated or not a profile.
    """
    command = [runtime_tool("iree-profile"), "dispatch", "--format=jsonl", str(file)]
    totals: dict[str, KeyTotal] = {}
    for row in _parse(file, _profile_text(file, command, timeout_s).splitlines()):
        if row["type"] == "host_dispatch_group":
            old = totals.get(row["key"], KeyTotal(0, 0, 0, 0))
            totals[row["key"]] = KeyTotal(
                old.count + row["valid"],
                old.total_ns + row["total_ns"],
                old.tile_ns + row["total_tile_duration_sum_ns"],
                old.tiles + row["total_tile_count"],
            )
    return totals


class _Spans:
    """When each call began and ended, as wide as the events that belong to it."""

    def __init__(self, calls: int) -> None:
        self._starts: list[int | None] = [None] * calls
        self._ends = [0] * calls

    @property
    def bounds(self) -> Iterator[tuple[int, int]]:
        for start, end in zip(self._starts, self._ends, strict=True):
            assert start is not None
            yield start, end

    def add(self, call: int | None, start: int, end: int) -> None:
        """Widen a call; nothing if the event belongs to none."""
        if call is not None:
            known = self._starts[call]
            self._starts[call] = start if known is None else min(known, start)
            self._ends[call] = max(self._ends[call], end)

    def add_submissions(self, events: Sequence[Any], call_of: dict[int, int], last_of_calls: set[int]) -> None:
        """Widen calls to the moment at which the host submitted their first work, such as an allocation.

        Memory is given back by the call that ran before; all else that is no execution prepares the next one.
        """
        call = 0
        for event in sorted(events, key=lambda event: event["submission_id"]):
            time = event["host_time_ns"]
            if event["op"] == "execute":
                call = call_of[event["submission_id"]]
                self.add(call, time, time)
                call += event["submission_id"] in last_of_calls
            elif event["op"] != "dealloca" and call < len(self._starts):
                self.add(call, time, time)


def _runs(rows: Sequence[Any], call_of: dict[int, int], process: int, function: str) -> Iterator[DispatchRun]:
    """Dispatches, numbered within their call in the order in which they stand in its command buffers."""
    ordered = sorted(rows, key=lambda row: (row["submission_id"], row["command_index"], row["event_id"]))
    site, last_call = 0, -1
    for row in ordered:
        call = call_of[row["submission_id"]]
        site = site + 1 if call == last_call else 0
        last_call = call
        yield DispatchRun(
            process=process,
            call=call,
            function=function,
            site=site,
            key=row["key"],
            start_ns=row["start_host_time_ns"],
            duration_ns=row["duration_ns"],
            tile_ns=row["tile_duration_sum_ns"],
            tiles=row["tile_count"],
            workgroups=tuple(row["workgroup_count"]),
        )


def _of_device(row: Any) -> Any:
    """A dispatch that the device timed, in the form of those that the host timed."""
    is_timed = bool(row["valid"] and row["derived_time_available"])
    return {
        **row,
        "op": "dispatch",
        "valid": is_timed,
        "start_host_time_ns": row["start_driver_host_cpu_time_ns"],
        "end_host_time_ns": row["end_driver_host_cpu_time_ns"],
        "tile_duration_sum_ns": row["duration_ns"],
        "tile_count": prod(row["workgroup_count"]),
    }


def _export(file: Path, timeout_s: float) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "rows.jsonl"
        tool = runtime_tool("iree-profile")
        _profile_text(
            file, [tool, "export", f"--format={_EXPORT_FORMAT}", f"--output={exported}", str(file)], timeout_s
        )
        if not exported.is_file():
            raise CaptureError(f"{file}: iree-profile exported nothing")
        with exported.open(encoding="utf-8") as stream:
            rows = list(_parse(file, stream))
    if not rows or rows[0].get("record_type") != "schema":
        raise CaptureError(f"{file}: iree-profile exported no schema; this program reads version {EXPORT_SCHEMA}")
    version = rows[0].get("schema_version")
    if version != EXPORT_SCHEMA:
        raise CaptureError(f"{file}: iree-profile exports schema {version}; this program reads {EXPORT_SCHEMA}")
    return rows


def _profile_text(file: Path, command: Sequence[str], timeout_s: float) -> str:
    if not file.is_file():
        raise CaptureError(f"{file}: no such profile")
    try:
        return run_child(command, timeout_s=timeout_s)
    except CaptureError as error:
        raise CaptureError(f"{file}: truncated, or not a profile of IREE's: {error}") from None


def _parse(file: Path, lines: Sequence[str] | Any) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise CaptureError(f"{file}: row {number} of what iree-profile exported is not JSON") from None
