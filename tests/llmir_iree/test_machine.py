from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmir_iree import machine

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status, as Linux has")


def test_available_memory_is_what_the_system_has() -> None:
    assert 0 < machine.available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 900), ("max", 5000), ("9223372036854771712", 5000), ("50", 0)],
)
def test_a_container_limits_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.stat").write_text("file 700\nanon 100\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000}))
    files = (str(tmp_path / "memory.max"), str(tmp_path / "memory.stat"), "anon")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (("/no/such/file", "/nor/this", "x"), files))
    assert machine.available_memory() == expected


MEASURES_ITSELF = """
import mmap, sys
import numpy as np
from llmir_iree import machine

before, peak_before = machine.anonymous_memory(), machine.peak_memory()
with open(sys.argv[1], "rb") as stream:
    mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
assert mapped.max() == 0
assert machine.anonymous_memory() < before + (8 << 20)
own = np.ones(64 << 20, np.uint8)
assert machine.anonymous_memory() > before + (56 << 20)
assert machine.peak_memory() >= max(peak_before, own.nbytes + mapped.nbytes)
"""


@needs_proc
def test_anonymous_memory_does_not_count_mapped_files(tmp_path: Path) -> None:
    """In a process of its own: here, what other tests left may be given back at any time."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 << 20))
    command = [sys.executable, "-P", "-c", MEASURES_ITSELF, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_processor_has_a_name_and_cores() -> None:
    assert machine.cpu_name()
    assert machine.cpu_count() >= 1


def test_without_proc_psutil_tells_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_field", lambda *a, **k: None)
    assert machine.anonymous_memory() is None
    assert machine.peak_memory() >= psutil.Process().memory_info().rss * 0.5
    assert machine.cpu_name()
