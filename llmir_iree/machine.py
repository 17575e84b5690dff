"""What this machine is and what it gives: its name, its memory, how fast memory is read."""

from __future__ import annotations

import mmap
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

# Several times the last-level cache of most machines, and small enough not to show in a process's memory.
_BUFFER_BYTES = 96 << 20
_FILE_BYTES = 512 << 20
_PASSES = 6
_PATIENCE_S = 0.3

_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss"),
)


def cpu_name() -> str:
    """Name of the processor, as its maker writes it where the system tells."""
    name = _field(Path("/proc/cpuinfo"), "model name")
    return name or platform.processor() or platform.machine()


def cpu_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_bandwidth(file: Path | None = None) -> float:
    """Measure a plain read of memory by all cores: bytes a second, the best of a few passes, in under half a second.

    Args:
        file: read this file's pages instead of a buffer of our own, where it is large enough to defeat the caches. It
            should be in the page cache already, as weights are that a run has just read.

    The reduction is the maximum of int64: of numpy's reductions it does the least arithmetic per byte (sums and dot
    products stop short of the memory's speed), and numpy releases the interpreter's lock meanwhile.
    """
    words = _words(file)
    shares = np.array_split(words, cpu_count())
    best = 0.0
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(np.max, shares))  # Faults the pages in and starts the threads.
        start = time.perf_counter()
        for _ in range(_PASSES):
            before = time.perf_counter()
            list(pool.map(np.max, shares))
            after = time.perf_counter()
            best = max(best, words.nbytes / (after - before))
            if after - start > _PATIENCE_S:
                break
    return best


def _words(file: Path | None) -> npt.NDArray[np.int64]:
    if file is not None and file.stat().st_size >= _BUFFER_BYTES:
        with file.open("rb") as stream:
            nbytes = min(file.stat().st_size, _FILE_BYTES) // 8 * 8
            mapped = mmap.mmap(stream.fileno(), nbytes, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.int64)
    return np.ones(_BUFFER_BYTES // 8, np.int64)


def available_memory() -> int:
    """Bytes that can still be used without swapping: what the system has left, or the container's limit if lower.

    Pages of files that happen to be in memory count as available.
    """
    available = psutil.virtual_memory().available
    for limit_file, stat_file, key in _CGROUP_LIMITS:
        try:
            limit = int(Path(limit_file).read_text())
            used = int(_field(Path(stat_file), key, separator=" ") or 0)
        except (OSError, ValueError):  # Not this version of cgroups, or no limit ("max").
            continue
        available = min(available, max(limit - used, 0))
    return int(available)


def peak_memory() -> int:
    """Bytes of the largest resident set that this process had, mapped files included."""
    return _status_bytes("VmHWM") or int(psutil.Process().memory_info().rss)


def anonymous_memory() -> int | None:
    """Bytes of memory that this process holds for itself now, mapped files excluded; None where no one tells."""
    return _status_bytes("RssAnon")


def _status_bytes(key: str) -> int | None:
    value = _field(Path("/proc/self/status"), key)
    return int(value.split()[0]) * 1024 if value else None


def _field(file: Path, key: str, separator: str = ":") -> str | None:
    """Value of the first line `key<separator>value` of a file, None where there is no such file or line."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(separator)
        if name.strip() == key:
            return value.strip()
    return None
