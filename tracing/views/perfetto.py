"""Writes a capture as a trace for ui.perfetto.dev: a track of calls and one of dispatches for each process.

The format is Perfetto's `Trace` of protos/perfetto/trace/trace.proto: a sequence of `TracePacket`s, of which two kinds
are enough, a `TrackDescriptor` for every track and a `TrackEvent` at either end of a slice. Names and categories stand
in every event instead of being interned; the file is a little larger for it, and each packet can be read alone.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmir_iree.tracing.capture import Call, Capture, CaptureError, DispatchRun, Site
from llmir_iree.tracing.views.output import replace_file
from llmir_iree.tracing.views.step import UNKNOWN_KIND

PERFETTO_SUFFIX = ".pftrace"

# Field numbers, by message.
_TRACE_PACKET = 1
_PACKET_TIMESTAMP, _PACKET_SEQUENCE, _PACKET_EVENT, _PACKET_FLAGS, _PACKET_TRACK = 8, 10, 11, 13, 60
_TRACK_UUID, _TRACK_NAME, _TRACK_PROCESS, _TRACK_PARENT = 1, 2, 3, 5
_PROCESS_PID, _PROCESS_NAME = 1, 6
_EVENT_ANNOTATION, _EVENT_TYPE, _EVENT_TRACK, _EVENT_CATEGORY, _EVENT_NAME = 4, 9, 11, 22, 23
_ANNOTATION_INT, _ANNOTATION_DOUBLE, _ANNOTATION_STRING, _ANNOTATION_NAME = 4, 5, 6, 10

_SLICE_BEGIN, _SLICE_END = 1, 2
_SEQUENCE_CLEARED = 1
_SEQUENCE_ID = 1

_VARINT, _FIXED64, _BYTES = 0, 1, 2

Field = tuple[int, "int | float | str | bytes"]


def write_perfetto(capture: Capture, output: Path) -> int:
    """Write every call and dispatch of a capture, and return how many slices that are.

    Raises:
        CaptureError: a table is damaged, there are no calls, or the file cannot be written.
    """
    calls = capture.read(Call)
    if not calls:
        raise CaptureError(f"{capture.folder}: it holds no calls to write to {output.name}")
    runs = capture.read(DispatchRun)
    sites = {(site.function, site.site, site.key): site for site in capture.read(Site)}
    packets = b"".join(_message((_TRACE_PACKET, packet)) for packet in _packets(capture, calls, runs, sites))
    replace_file(output, packets)
    return len(calls) + len(runs)


def _packets(
    capture: Capture, calls: list[Call], runs: list[DispatchRun], sites: dict[tuple[str, int, str], Site]
) -> Iterator[bytes]:
    runs_of: defaultdict[int, list[DispatchRun]] = defaultdict(list)
    for run in runs:
        runs_of[run.process].append(run)
    is_first = True
    for process in sorted({call.process for call in calls} | set(runs_of)):
        tracks = _Tracks(process)
        for track in tracks.describe(Path(capture.manifest.subject).name):
            yield _packet((_PACKET_TRACK, track), is_first=is_first)
            is_first = False
        for call in sorted((call for call in calls if call.process == process), key=lambda call: call.start_ns):
            details = {"call": call.call, "wall_us": call.wall_ns / 1e3}
            yield from _slice(tracks.calls, call.start_ns, call.wall_ns, call.function, "call", details)
        lanes: list[int] = []
        for run in sorted(runs_of[process], key=lambda run: (run.start_ns, run.site)):
            # Slices of one track have to nest; dispatches that overlap take tracks side by side.
            lane = next((lane for lane, end in enumerate(lanes) if end <= run.start_ns), len(lanes))
            if lane == len(lanes):
                lanes.append(0)
                yield _packet((_PACKET_TRACK, tracks.describe_lane(lane)))
            lanes[lane] = run.start_ns + run.duration_ns
            site = sites.get((run.function, run.site, run.key))
            category = site.kind if site else UNKNOWN_KIND
            yield from _slice(tracks.lane(lane), run.start_ns, run.duration_ns, run.key, category, _details(run, site))


class _Tracks:
    """Numbers of a process's tracks: unique in the file, and none is 0, which Perfetto keeps for itself."""

    _STRIDE = 1 << 16

    def __init__(self, process: int) -> None:
        self.process = (process + 1) * self._STRIDE
        self.calls = self.process + 1
        self._pid = process + 1

    def lane(self, lane: int) -> int:
        return self.process + 2 + lane

    def describe(self, subject: str) -> Iterator[bytes]:
        process = _message((_PROCESS_PID, self._pid), (_PROCESS_NAME, f"{subject}, process {self._pid - 1}"))
        yield _message((_TRACK_UUID, self.process), (_TRACK_PROCESS, process))
        yield _message((_TRACK_UUID, self.calls), (_TRACK_NAME, "calls"), (_TRACK_PARENT, self.process))

    def describe_lane(self, lane: int) -> bytes:
        name = "dispatches" if lane == 0 else f"dispatches, overlapping {lane}"
        return _message((_TRACK_UUID, self.lane(lane)), (_TRACK_NAME, name), (_TRACK_PARENT, self.process))


def _details(run: DispatchRun, site: Site | None) -> dict[str, int | float | str]:
    """What Perfetto shows beside a dispatch, and its queries find as args."""
    details: dict[str, int | float | str | None] = {
        "site": run.site,
        "workgroups": "x".join(map(str, run.workgroups)),
        "tiles": run.tiles,
        "busy_threads": round(run.tile_ns / run.duration_ns, 3) if run.duration_ns else None,
    }
    if site is not None:
        moved = (site.bytes_read or 0) + (site.bytes_written or 0)
        details |= {
            "kind": site.kind,
            "layer": site.layer,
            "weight": site.weight,
            "shape": site.shape,
            "op": site.op,
            "bytes_read": site.bytes_read,
            "bytes_written": site.bytes_written,
            "flops": site.flops,
            "gb_s": round(moved / run.duration_ns, 3) if moved and run.duration_ns else None,
        }
    return {name: value for name, value in details.items() if value is not None}


def _slice(
    track: int, start_ns: int, duration_ns: int, name: str, category: str, details: Mapping[str, int | float | str]
) -> Iterator[bytes]:
    begin: list[Field] = [
        (_EVENT_TYPE, _SLICE_BEGIN),
        (_EVENT_TRACK, track),
        (_EVENT_CATEGORY, category),
        (_EVENT_NAME, name),
    ]
    notes: list[Field] = [(_EVENT_ANNOTATION, _annotation(key, value)) for key, value in details.items()]
    yield _packet((_PACKET_EVENT, _message(*begin, *notes)), timestamp=start_ns)
    end = _message((_EVENT_TYPE, _SLICE_END), (_EVENT_TRACK, track))
    yield _packet((_PACKET_EVENT, end), timestamp=start_ns + duration_ns)


def _annotation(name: str, value: int | float | str) -> bytes:
    kinds = {int: _ANNOTATION_INT, float: _ANNOTATION_DOUBLE, str: _ANNOTATION_STRING}
    return _message((_ANNOTATION_NAME, name), (kinds[type(value)], value))


def _packet(body: Field, timestamp: int | None = None, *, is_first: bool = False) -> bytes:
    fields: list[Field] = [] if timestamp is None else [(_PACKET_TIMESTAMP, timestamp)]
    flags: list[Field] = [(_PACKET_FLAGS, _SEQUENCE_CLEARED)] if is_first else []
    return _message(*fields, body, (_PACKET_SEQUENCE, _SEQUENCE_ID), *flags)


def _message(*fields: Field) -> bytes:
    """A protobuf message: ints as varints, floats as doubles, text and messages with their length before them."""
    return b"".join(_field(number, value) for number, value in fields)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    match value:
        case int():
            return _varint(number << 3 | _VARINT) + _varint(value & (1 << 64) - 1)
        case float():
            return _varint(number << 3 | _FIXED64) + struct.pack("<d", value)
        case str():
            value = value.encode(errors="replace")
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the eighth says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
