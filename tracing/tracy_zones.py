"""What is read of a Tracy file: its zones as columns, and what they refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_LONG_COLUMNS = ("start", "end", "self_ns")


@dataclass(frozen=True)
class SourceLocation:
    """Where a zone stands in the source; `name` is what the zone is called there, the function's name if not else."""

    name: str
    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Thread:
    """A thread of the process, or what a GPU's driver calls a context."""

    id: int
    name: str


@dataclass(frozen=True)
class Message:
    """A text that the program left at a time."""

    time_ns: int
    text: str


@dataclass(frozen=True, eq=False)
class Zones:
    """Zones as columns: thread by thread, in the order of their starts, and each before those inside it.

    Attributes:
        start, end: int64, ns since the program's start; `end` is -1 where the program ended first.
        self_ns: int64, time that no zone inside this one takes; 0 where there is no end.
        thread: int32, row in the file's `threads`, for zones of GPUs in its `gpu_contexts`.
        location, name: int32, row in the file's `locations` and `names`.
        parent: int32, row of the enclosing zone among all zones of the file; -1 if there is none.
    """

    start: Int64Array
    end: Int64Array
    self_ns: Int64Array
    thread: Int32Array
    location: Int32Array
    name: Int32Array
    parent: Int32Array

    def __len__(self) -> int:
        return len(self.start)

    @property
    def has_ended(self) -> npt.NDArray[np.bool_]:
        """Which of them have a start and an end."""
        ended: npt.NDArray[np.bool_] = (self.start >= 0) & (self.end >= self.start)
        return ended

    @property
    def duration_ns(self) -> Int64Array:
        """int64, 0 where there is no end."""
        return np.where(self.has_ended, self.end - self.start, 0)

    def take(self, rows: npt.NDArray[Any]) -> Zones:
        """Some of them: by number, or those where a mask holds."""
        return Zones(**{column.name: getattr(self, column.name)[rows] for column in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Zones]) -> Zones:
        """One behind the other."""
        joined = {}
        for column in fields(cls):
            kind = np.int64 if column.name in _LONG_COLUMNS else np.int32
            joined[column.name] = np.concatenate([np.zeros(0, kind), *(getattr(part, column.name) for part in parts)])
        return cls(**joined)


@dataclass(frozen=True, eq=False)
class TracyFile:
    """What was read of one file.

    Attributes:
        path: of the file.
        program, pid: what was traced.
        host: what Tracy knows of the machine, under such names as "CPU", "CPU cores" and "RAM".
        threads: those that had zones.
        locations, names: what zones refer to; a name is the zone's own, or else that of its location.
        cpu_zones, gpu_zones: all zones.
        gpu_contexts: the devices and queues that GPU zones belong to.
        messages: in the order of their times.
        frames: for every set of frames, by name, int64 [frames, 2]: start and end in ns. Where a frame ends when the
            next begins, the last one's end is -1.
    """

    path: Path
    program: str
    pid: int
    host: Mapping[str, str]
    threads: tuple[Thread, ...]
    locations: tuple[SourceLocation, ...]
    names: tuple[str, ...]
    cpu_zones: Zones
    gpu_zones: Zones
    gpu_contexts: tuple[Thread, ...]
    messages: tuple[Message, ...]
    frames: Mapping[str, Int64Array]

    def zones(self, name_glob: str = "*") -> Zones:
        """Zones of the CPU's threads whose names match a pattern such as "decode*"."""
        if name_glob == "*":
            return self.cpu_zones
        matching = [row for row, name in enumerate(self.names) if fnmatchcase(name, name_glob)]
        return self.cpu_zones.take(np.isin(self.cpu_zones.name, matching))
