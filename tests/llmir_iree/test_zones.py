"""Zones of our own in a Tracy capture, and what they cost where there is none."""

import importlib.util
import sys
import timeit
from pathlib import Path

import pytest

from llmir_iree.tracing.tracy_capture import record_tracy
from llmir_iree.tracing.tracy_dispatches import find_dispatches
from llmir_iree.tracing.tracy_file import read_tracy
from llmir_iree.tracing.tracy_totals import total_zones
from llmir_iree.zones import frame_mark, is_tracing, message, zone

PROGRAM = """
import threading
from llmir_iree.zones import frame_mark, is_tracing, message, zone

assert is_tracing()

def work():
    for index in range(3):
        with zone("outer", f"turn {index}"):
            with zone("inner"):
                message(f"messäge {index}")
        frame_mark("turn")

work()
with zone("failing"):
    try:
        with zone("failed"):
            raise ValueError
    except ValueError:
        pass
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

# A device's zones, with times of its own, through the same library.
GPU_PROGRAM = """
import ctypes
from iree._runtime.libs import _runtime

library = ctypes.CDLL(_runtime.__file__)

def structure(**kinds):
    return type("S", (ctypes.Structure,), {"_fields_": list(kinds.items())})

q, h, b, f = ctypes.c_uint64, ctypes.c_uint16, ctypes.c_uint8, ctypes.c_float
Context = structure(time=q, period=f, context=b, flags=b, type=b)
Name = structure(context=b, name=ctypes.c_char_p, length=h)
Begin = structure(location=q, query=h, context=b)
End = structure(query=h, context=b)
Time = structure(time=q, query=h, context=b)
emit = lambda name, value: library[f"___tracy_emit_gpu_{name}"](value)
allocate = library["___tracy_alloc_srcloc_name"]
allocate.restype = q
text = (ctypes.c_char_p, ctypes.c_size_t)
allocate.argtypes = (ctypes.c_uint32, *text, *text, *text, ctypes.c_uint32)

emit("new_context", Context(1000, 1.0, 0, 0, 2))
emit("context_name", Name(0, b"queue", 5))
for index in range(3):
    location = allocate(5, b"m.mlir", 6, b"matmul", 6, b"matmul", 6, 0)
    emit("zone_begin_alloc", Begin(location, 2 * index, 0))
    emit("zone_end", End(2 * index + 1, 0))
for index in range(3):
    emit("time", Time(2000 + 1000 * index, 2 * index, 0))
    emit("time", Time(2500 + 1000 * index + index, 2 * index + 1, 0))
"""

needs_tracy = pytest.mark.skipif(
    importlib.util.find_spec("iree._runtime_libs_tracy") is None,
    reason="IREE's tracer is missing: install a wheel of iree-base-runtime for Linux",
)


@needs_tracy
def test_zones_are_in_the_capture(tmp_path: Path) -> None:
    file = tmp_path / "x.tracy"
    assert record_tracy([sys.executable, "-c", PROGRAM], file, timeout_s=60).problem is None
    read = read_tracy(file)
    totals = {total.name: total for total in total_zones(read, 0)}
    assert {name: totals[name].count for name in ("outer", "inner", "failing", "failed")} == {
        "outer": 6,
        "inner": 6,
        "failing": 1,
        "failed": 1,
    }
    assert totals["outer"].source == "<string>:9"
    inner, outer = read.zones("inner"), read.zones("outer")
    around = [read.names[read.cpu_zones.name[parent]] for parent in inner.parent]
    assert around == ["outer"] * 6
    assert len(set(outer.thread.tolist())) == 2
    assert sorted(message.text for message in read.messages) == [f"messäge {index}" for index in (0, 0, 1, 1, 2, 2)]
    assert len(read.frames["turn"]) == 6


@needs_tracy
def test_zones_of_a_device_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.tracy"
    assert record_tracy([sys.executable, "-c", GPU_PROGRAM], file, timeout_s=60).problem is None
    read = read_tracy(file)
    assert [context.name for context in read.gpu_contexts] == ["queue"]
    assert read.gpu_zones.duration_ns.tolist() == [500, 501, 502]
    assert (read.gpu_zones.start - read.gpu_zones.start[0]).tolist() == [0, 1000, 2000]
    [total] = [total for total in total_zones(read, 0) if total.source == "queue, m.mlir:5"]
    assert (total.name, total.count, total.total_ns) == ("matmul", 3, 1503)
    assert [(run.key, run.duration_ns) for run in find_dispatches(read)] == [
        ("matmul", 500),
        ("matmul", 501),
        ("matmul", 502),
    ]


@pytest.mark.timed
def test_without_the_instrumented_runtime_nothing_happens() -> None:
    assert not is_tracing()
    frame_mark("turn")
    message("text")

    def work() -> None:
        with zone("outer"):
            pass

    # Far below anything that a step does; several times what it is, for machines that are busy.
    assert min(timeit.repeat(work, number=1000, repeat=5)) / 1000 < 5e-6
