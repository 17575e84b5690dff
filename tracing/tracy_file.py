"""Reads Tracy's files, as IREE's capture tool writes them.

A `.tracy` file has no written specification; this reads one version of it, 0.11.2, and refuses all others. Of its
sections, in their order, everything up to the zones of GPUs is read; plots, memory, call stacks and samples, which
follow, are not. What is read is checked against the counts that the file itself gives.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.tracy_zones import Int32Array, Int64Array, Message, SourceLocation, Thread, TracyFile, Zones

FILE_VERSION = (0, 11, 2)

_CONTAINER_MAGIC = b"tr\xfdP"
_OLD_MAGICS = (b"tlZ\x04", b"tZst")
_PAYLOAD_MAGIC = b"tracy"
_CODECS = {0: "lz4", 1: "zstd"}
_ZSTD = 1
# Blocks of a container inflate to 64 KiB, and a stream refers to what it held before as far as the codec likes to.
_WINDOW_BYTES = 1 << 31

_FRAME_FIELDS = [("start", "<i8"), ("end", "<i8"), ("image", "<i4")]
_ENDLESS_FRAME_FIELDS = [("start", "<i8"), ("image", "<i4")]

# So many zones without others in them, one behind the other, make it likely that more follow.
_RUN = 16


def read_tracy(file: Path) -> TracyFile:
    """Read a file.

    Raises:
        CaptureError: not a Tracy file, one of another version or compression, or one that is torn: cut off, or written
            while the program still ran.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read()
    except OSError as error:
        raise CaptureError(f"{file}: cannot be read: {error.strerror or error}") from None
    try:
        return _Payload(file, _inflate(file, raw)).read()
    except _TornError as error:
        raise CaptureError(f"{file}: torn: {error}; record it again, and let the program end first") from None


class _TornError(Exception):
    """The file does not hold what it says it holds."""


def _inflate(file: Path, raw: bytes) -> bytes:
    """Undo the container: [u32 n][n bytes] again and again, block i the next piece of stream i % streams.

    Raises:
        CaptureError: not a container, or one that is compressed in another way.
        _TornError: it ends in the middle of a block, or a block is damaged.
    """
    if raw[:4] in _OLD_MAGICS:
        raise CaptureError(f"{file}: a Tracy file older than {_dotted(FILE_VERSION)}, which this program reads")
    if raw[:4] != _CONTAINER_MAGIC or len(raw) < 6:
        raise CaptureError(f"{file}: not a Tracy file")
    codec, streams = raw[4], raw[5]
    if codec != _ZSTD:
        name = _CODECS.get(codec, f"codec {codec}")
        raise CaptureError(f"{file}: compressed with {name}; this program reads zstd, which iree-tracy-capture writes")
    if streams == 0:
        raise _TornError("it has no streams")
    inflaters = [zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj() for _ in range(streams)]
    pieces: list[bytes] = []
    view, position = memoryview(raw), 6
    while position < len(raw):
        begin = position + 4
        end = begin + int.from_bytes(view[position:begin], "little")
        if end > len(raw):
            raise _TornError(f"it ends inside block {len(pieces)}")
        try:
            pieces.append(inflaters[len(pieces) % streams].decompress(view[begin:end]))
        except zstandard.ZstdError:
            raise _TornError(f"block {len(pieces)} is damaged") from None
        position = end
    return b"".join(pieces)


@dataclass(frozen=True)
class _Record:
    """How a kind of zone is written: [head][zones inside][foot], the head with the number of zones inside.

    Attributes:
        head, foot: bytes of each.
        count_at, count_type: where in the head, and as what, the number of zones inside stands.
        location_at: where in the head the location stands.
        start_at, end_at: where in the head and in the foot the times stand.
    """

    head: int
    foot: int
    count_at: int
    count_type: str
    location_at: int
    start_at: int
    end_at: int


# [i16 location][i64 start][u32 extra][u32 zones] ... [i64 end]
_CPU_RECORD = _Record(18, 8, 14, "<I", location_at=0, start_at=2, end_at=0)
_EXTRA_AT = 10
# [i64 sent][i64 start][i16 location][u24 call stack][u16 thread][u64 zones] ... [i64 sent][i64 end]
_GPU_RECORD = _Record(31, 16, 23, "<Q", location_at=16, start_at=8, end_at=8)


class _Payload:
    """The inflated file, read from its begin to its end."""

    def __init__(self, file: Path, data: bytes) -> None:
        self._file = file
        self._data = data
        self._position = 0

    def read(self) -> TracyFile:
        """Read all sections up to the zones of GPUs."""
        program, pid, host = self._read_header()
        frames = self._read_frames()
        self._read_strings()
        self._skip_threads()
        self._read_locations()
        self._skip_locks()
        messages = self._read_messages()
        extra_names = self._read_extras()
        threads, cpu_zones = self._read_cpu_zones(extra_names)
        contexts, gpu_zones = self._read_gpu_zones()
        return TracyFile(
            path=self._file,
            program=program,
            pid=pid,
            host=host,
            threads=threads,
            locations=tuple(self._locations),
            names=tuple(self._names),
            cpu_zones=cpu_zones,
            gpu_zones=gpu_zones,
            gpu_contexts=contexts,
            messages=messages,
            frames={self._strings.get(name, "") if name else "Frame": rows for name, rows in frames},
        )

    def _read_header(self) -> tuple[str, int, dict[str, str]]:
        """Name and number of the program, and what is known of the machine."""
        if self._bytes(len(_PAYLOAD_MAGIC)) != _PAYLOAD_MAGIC:
            raise CaptureError(f"{self._file}: not a Tracy file")
        version = self._take("BBB")
        if version != FILE_VERSION:
            expected = _dotted(FILE_VERSION)
            raise CaptureError(f"{self._file}: of Tracy {_dotted(version)}; this program reads {expected}")
        _delay, _resolution, _multiplier, _last, _offset, pid, _period = self._take("QQdqQQq")
        self._skip(1 + 4 + 12 + 1)  # Architecture, model and maker of the CPU; whether it connected on demand.
        self._text()  # The capture's name.
        program = self._text()
        self._skip(8 + 8)  # When it was captured, and built.
        host = dict(line.split(": ", 1) for line in self._text().splitlines() if ": " in line)
        for _package in self._times():
            self._skip(4)
            for _die in self._times():
                self._skip(4)
                for _core in self._times():
                    self._skip(4)
                    self._skip(4 * self._one("Q"))
        self._skip(28)  # Where it crashed.
        return program, pid, host

    def _read_frames(self) -> list[tuple[int, Int64Array]]:
        """Sets of frames: reference to the name, and times."""
        sets = []
        for _ in self._times():
            name, is_continuous, count = self._take("QBQ")
            table = self._table(count, _ENDLESS_FRAME_FIELDS if is_continuous else _FRAME_FIELDS)
            rows = np.full((count, 2), -1, np.int64)
            if is_continuous:
                rows[:, 0] = np.cumsum(table["start"])
                rows[:-1, 1] = rows[1:, 0]
            else:
                rows[:] = np.cumsum(np.column_stack((table["start"], table["end"])).ravel()).reshape(-1, 2)
            sets.append((name, rows))
        return sets

    def _read_strings(self) -> None:
        self._texts: list[str] = []
        by_pointer: dict[int, str] = {}
        for _ in self._times():
            pointer = self._one("Q")
            self._texts.append(self._text())
            by_pointer[pointer] = self._texts[-1]
        pairs = self._table(self._one("Q"), [("id", "<u8"), ("pointer", "<u8")])
        self._strings: dict[int, str] = {key: by_pointer.get(pointer, "") for key, pointer in pairs.tolist()}
        pairs = self._table(self._one("Q"), [("id", "<u8"), ("pointer", "<u8")])
        self._thread_names = {key: by_pointer.get(pointer, "") for key, pointer in pairs.tolist()}

    def _skip_threads(self) -> None:
        self._skip(24 * self._one("Q"))  # Names of other processes.
        for _ in range(2):  # The threads that short numbers stand for, of this process and of others.
            self._skip(8 * self._one("Q"))

    def _read_locations(self) -> None:
        """Locations: those with a short number, in its order, then those that the program made while it ran."""
        static = {}
        for _ in self._times():
            pointer = self._one("Q")
            static[pointer] = self._location()
        unknown = SourceLocation("?", "?", "?", 0)
        numbered = self._table(self._one("Q"), [("pointer", "<u8")])["pointer"].tolist()
        self._locations = [static.get(pointer, unknown) for pointer in numbered]
        self._numbered = len(self._locations)
        self._locations += [self._location() for _ in self._times()]
        self._names: dict[str, int] = {}
        rows = [self._names.setdefault(location.name, len(self._names)) for location in self._locations]
        self._location_names = np.array(rows, np.int32)
        for _ in range(2):  # How many zones each has, of CPU and GPU.
            self._skip(10 * self._one("Q"))

    def _skip_locks(self) -> None:
        for _ in self._times():
            self._skip(4 + 3 + 2 + 1 + 1 + 8 + 8)
            self._skip(8 * self._one("Q"))
            self._skip(12 * self._one("Q"))

    def _read_messages(self) -> tuple[Message, ...]:
        time_ns, messages = 0, []
        for _ in self._times():
            _pointer, passed = self._take("Qq")
            time_ns += passed
            messages.append(Message(time_ns, self._reference() or ""))
            self._skip(4 + 3)  # Colour, call stack.
        return tuple(messages)

    def _read_extras(self) -> Int64Array:
        """What zones have beside the usual: int64, rows of the names that are their own, -1 where there is none."""
        table = self._table(self._one("Q"), [("stack_text", "6u1"), ("name", "3u1"), ("colour", "3u1")])
        raw = table["name"].astype(np.int64)
        numbers = raw[:, 0] | raw[:, 1] << 8 | raw[:, 2] << 16
        if len(numbers) and numbers.max() > len(self._texts):
            raise _TornError(f"a zone is named by string {numbers.max() - 1}, there are {len(self._texts)}")
        known = np.full(len(self._texts) + 1, -1, np.int64)
        for number in np.unique(numbers[numbers > 0]).tolist():
            known[number] = self._names.setdefault(self._texts[number - 1], len(self._names))
        rows: Int64Array = known[numbers]
        return rows

    def _read_cpu_zones(self, extra_names: Int64Array) -> tuple[tuple[Thread, ...], Zones]:
        promised, _with_children, count = self._take("QQQ")
        threads, parts, rows = [], [], 0
        for row in range(count):
            number, _count, _samples, _is_fiber, _hint = self._take("QQQBi")
            threads.append(Thread(number, self._thread_names.get(number, "") or f"thread {number}"))
            tree = self._walk(_CPU_RECORD, self._one("I"))
            location = self._column(tree.heads + _CPU_RECORD.location_at, "<i2")
            extra = self._column(tree.heads + _EXTRA_AT, "<u4")
            if len(extra) and extra.max() >= max(len(extra_names), 1):
                raise _TornError(f"a zone refers to note {extra.max()}, there are {len(extra_names)}")
            zones = self._zones(tree, _CPU_RECORD, location, row, rows)
            if len(extra_names):
                own = extra_names[extra]
                zones = replace(zones, name=np.where(own >= 0, own, zones.name).astype(np.int32))
            parts.append(zones)
            rows += len(zones)
            self._skip(8 * self._one("Q"))  # Messages.
            self._skip(11 * self._one("Q"))  # Samples at switches between threads.
            self._skip(11 * self._one("Q"))  # Samples.
        if rows != promised:
            raise _TornError(f"it holds {rows} zones, its header says {promised}")
        return tuple(threads), Zones.join(parts)

    def _read_gpu_zones(self) -> tuple[tuple[Thread, ...], Zones]:
        promised, _with_children, count = self._take("QQQ")
        contexts, parts, rows = [], [], 0
        for row in range(count):
            number, _is_calibrated, _count, _period, _kind = self._take("QBQfB")
            name = int.from_bytes(self._bytes(3), "little")
            if name > len(self._texts):
                raise _TornError(f"a GPU context is named by string {name - 1}, there are {len(self._texts)}")
            contexts.append(Thread(number, self._texts[name - 1] if name else f"GPU {row}"))
            self._skip(8)  # Where its clock wraps.
            for _thread in self._times():
                self._skip(8)
                tree = self._walk(_GPU_RECORD, self._one("Q"))
                location = self._column(tree.heads + _GPU_RECORD.location_at, "<i2")
                parts.append(self._zones(tree, _GPU_RECORD, location, row, rows))
                rows += len(parts[-1])
        zones = Zones.join(parts)
        # The header counts those whose start the device has told.
        started = int(np.count_nonzero(zones.start >= 0))
        if started != promised:
            raise _TornError(f"it holds {started} zones of GPUs, its header says {promised}")
        return tuple(contexts), zones

    def _walk(self, record: _Record, roots: int) -> _Tree:
        """Find where the zones of one timeline lie, which only a walk along all of them can tell."""
        data, position = self._data, self._position
        read = struct.Struct(record.count_type).unpack_from
        head, foot, count_at = record.head, record.foot, record.count_at
        leaf = head + foot
        depths, parents = array("i"), array("i")
        inner, sizes = array("i"), array("i")
        stack: list[tuple[int, int]] = []
        depth, parent, left, run = 0, -1, roots, 0
        try:
            while True:
                while left:
                    (children,) = read(data, position + count_at)
                    if children:
                        stack.append((parent, left - 1))
                        parent, left = len(depths), children
                        depths.append(depth)
                        parents.append(stack[-1][0])
                        depth += 1
                        position += head
                        run = 0
                        continue
                    depths.append(depth)
                    parents.append(parent)
                    position += leaf
                    left -= 1
                    run += 1
                    if run >= _RUN and left:
                        many = self._count_leaves(record, position, min(left, 4 * run))
                        depths.extend(array("i", (depth,)) * many)
                        parents.extend(array("i", (parent,)) * many)
                        position += many * leaf
                        left -= many
                        run = run + many if many else 0
                if not stack:
                    break
                inner.append(parent)
                sizes.append(len(depths) - parent)
                parent, left = stack.pop()
                depth -= 1
                position += foot
                run = 0
        except struct.error:
            raise _TornError(f"its zones are cut off after {len(depths)} of a thread") from None
        if position > len(data):
            raise _TornError("the last zone of a thread is cut off")
        begin, self._position = self._position, position
        depth_of = np.array(depths, np.int64)
        size = np.ones(len(depths), np.int64)
        size[np.array(inner, np.int64)] = np.array(sizes, np.int64)
        # Before a zone's head stand the heads of all zones before it, and the feet of those that are over.
        row = np.arange(len(depths))
        heads = begin + head * row + foot * (row - depth_of)
        feet = begin + head * (row + size) + foot * (row + size - 1 - depth_of)
        return _Tree(depth_of, size, np.array(parents, np.int32), heads, feet)

    def _count_leaves(self, record: _Record, position: int, most: int) -> int:
        """How many of the next zones, `most` at most, are without others in them."""
        step = record.head + record.foot
        most = min(most, (len(self._data) - position) // step)
        if most <= 0:
            return 0
        counts = np.ndarray((most,), record.count_type, self._data, position + record.count_at, (step,))
        with_children = np.flatnonzero(counts)
        return int(with_children[0]) if len(with_children) else most

    def _zones(self, tree: _Tree, record: _Record, location: Int64Array, thread: int, first_row: int) -> Zones:
        """Columns of one timeline; the times are written as steps, of all starts and ends in their order."""
        count = len(tree.depth)
        row = np.arange(count)
        start_at, end_at = 2 * row - tree.depth, 2 * (row + tree.size) - 1 - tree.depth
        times = np.empty(2 * count, np.int64)
        times[start_at] = self._column(tree.heads + record.start_at, "<i8")
        times[end_at] = self._column(tree.feet + record.end_at, "<i8")
        np.cumsum(times, out=times)
        start, end = times[start_at], times[end_at]

        made = len(self._locations) - self._numbered
        if count and not -made <= location.min() <= location.max() < self._numbered:
            raise _TornError(f"a zone refers to a source location outside {-made} to {self._numbered - 1}")
        # Those made while the program ran have the numbers -1, -2 and so on.
        location = np.where(location >= 0, location, self._numbered - 1 - location)
        duration = np.where((start >= 0) & (end >= start), end - start, 0)
        is_inside = tree.parent >= 0
        # Sums of ns are exact in floats up to 2**53, about 100 days.
        inside = np.bincount(tree.parent[is_inside], weights=duration[is_inside], minlength=count).astype(np.int64)
        return Zones(
            start=start,
            end=end,
            self_ns=np.maximum(duration - inside, 0),
            thread=np.full(count, thread, np.int32),
            location=location.astype(np.int32),
            name=self._location_names[location],
            parent=np.where(is_inside, tree.parent + first_row, -1).astype(np.int32),
        )

    def _column(self, positions: Int64Array, kind: str) -> Int64Array:
        """Values of one type at positions anywhere in the file."""
        itemsize = np.dtype(kind).itemsize
        anywhere = np.ndarray((len(self._data) - itemsize + 1,), kind, self._data, 0, (1,))
        return anywhere[positions].astype(np.int64)

    def _location(self) -> SourceLocation:
        name, function, file = self._reference(), self._reference() or "", self._reference() or ""
        line, _colour = self._take("II")
        return SourceLocation(name or function or "?", function, file, line)

    def _reference(self) -> str | None:
        """A reference to a string: to its row, or to what was its address."""
        value, bits = self._take("QB")
        is_row, is_set = bits & 1, bits & 2
        if not is_set:
            return None
        if not is_row:
            return self._strings.get(value)
        if value >= len(self._texts):
            raise _TornError(f"it refers to string {value}, there are {len(self._texts)}")
        text: str = self._texts[value]
        return text

    def _table(self, count: int, fields: list[tuple[str, str]]) -> npt.NDArray[Any]:
        kind = np.dtype(fields)
        begin = self._position
        self._skip(count * kind.itemsize)
        return np.frombuffer(self._data, kind, count, begin)

    def _times(self) -> Iterator[int]:
        """Numbers from 0 to a count that stands here; a wrong one ends where the file does."""
        return iter(range(self._one("Q")))

    def _text(self) -> str:
        return self._bytes(self._one("Q")).decode("utf-8", "replace")

    def _one(self, kind: str) -> int:
        (value,) = self._take(kind)
        return int(value)

    def _take(self, kinds: str) -> tuple[Any, ...]:
        layout = "<" + kinds
        begin = self._position
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, begin)

    def _bytes(self, count: int) -> bytes:
        begin = self._position
        self._skip(count)
        return self._data[begin : self._position]

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._position:
            raise _TornError("it ends before its zones do")
        self._position += count


@dataclass(frozen=True, eq=False)
class _Tree:
    """Zones of one timeline: depth, number of zones from it to the last inside it, parent, places of head and foot."""

    depth: Int64Array
    size: Int64Array
    parent: Int32Array
    heads: Int64Array
    feet: Int64Array


def _dotted(version: tuple[Any, ...]) -> str:
    return ".".join(map(str, version))
