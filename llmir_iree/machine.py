"""What this machine is: its name, its cores, its memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

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
