"""Tracy's files: written here by hand, byte by byte, and by IREE's capture tool."""

import importlib.util
import json
import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import zstandard
from iree.compiler import tools

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.tracy_capture import find_tracy_tool, record_tracy
from llmir_iree.tracing.tracy_dispatches import find_dispatches
from llmir_iree.tracing.tracy_file import FILE_VERSION, read_tracy
from llmir_iree.tracing.tracy_totals import total_zones
from llmir_iree.tracing.tracy_zones import TracyFile

needs_tracy = pytest.mark.skipif(
    importlib.util.find_spec("iree._runtime_libs_tracy") is None,
    reason="IREE's tracer is missing: install a wheel of iree-base-runtime for Linux",
)

CALLS = 30
# The cost of timing a workgroup, a third of a microsecond, is a part of one time and not of the other: what is compared
# to within 2% takes a hundred times as long, on fast machines as well.
MODULE = """
func.func @main(%a: tensor<128x512xf32>, %b: tensor<512x512xf32>, %c: tensor<512x2048xf32>) -> tensor<128x2048xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<128x512xf32>
  %fill = linalg.fill ins(%zero : f32) outs(%empty : tensor<128x512xf32>) -> tensor<128x512xf32>
  %first = linalg.matmul ins(%a, %b : tensor<128x512xf32>, tensor<512x512xf32>) outs(%fill : tensor<128x512xf32>)
      -> tensor<128x512xf32>
  %second = linalg.matmul ins(%first, %b : tensor<128x512xf32>, tensor<512x512xf32>) outs(%fill : tensor<128x512xf32>)
      -> tensor<128x512xf32>
  %wide = tensor.empty() : tensor<128x2048xf32>
  %wide_fill = linalg.fill ins(%zero : f32) outs(%wide : tensor<128x2048xf32>) -> tensor<128x2048xf32>
  %third = linalg.matmul ins(%second, %c : tensor<128x512xf32>, tensor<512x2048xf32>)
      outs(%wide_fill : tensor<128x2048xf32>) -> tensor<128x2048xf32>
  return %third : tensor<128x2048xf32>
}
"""


@dataclass
class Node:
    """A zone to write: location, or a number below 0 for one made while the program ran; note; zones inside."""

    start: int
    end: int
    location: int = 1
    note: int = 0
    children: list["Node"] = field(default_factory=list)

    def __iter__(self) -> Iterator["Node"]:
        yield self
        for child in self.children:
            yield from child


class Steps:
    """Times as the file has them, each relative to the one before."""

    def __init__(self) -> None:
        self.time = 0

    def __call__(self, time: int) -> bytes:
        step, self.time = time - self.time, time
        return struct.pack("<q", step)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def u24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def row(text: int | None) -> bytes:
    """A reference to a string by its row."""
    return u64(0) + b"\0" if text is None else u64(text) + b"\x03"


STRINGS = ("main", "main.cc", "compiled", "own name", "iree_helper", "worker", "GPU queue", "hello", "frames")


def payload(
    threads: dict[int, list[Node]],
    gpu: list[Node] | None = None,
    version: tuple[int, ...] = FILE_VERSION,
    promised: int | None = None,
    timeline: bytes | None = None,
) -> bytes:
    """All sections up to the zones of GPUs; `timeline` stands for the zones of all threads if given."""
    parts = [b"tracy", bytes(version)]
    parts.append(struct.pack("<QQdqQQq", 0, 0, 1.0, 0, 0, 77, 0) + bytes(18))
    host = b"OS: some\nCPU: a core\nCPU cores: 3\n"
    parts += [u64(0), u64(4), b"prog", u64(0, 0), u64(len(host)), host]
    parts += [
        u64(1),
        struct.pack("<I", 0),
        u64(1),
        struct.pack("<I", 0),
        u64(1),
        struct.pack("<I", 0),
        u64(2),
        bytes(8),
    ]
    parts.append(bytes(28))
    # Two sets of frames: the program's own, without ends, and one with.
    parts += [u64(2), struct.pack("<QBQ", 0, 1, 2), struct.pack("<qiqi", 5, -1, 10, -1)]
    parts += [struct.pack("<QBQ", 9000, 0, 2), struct.pack("<qqiqqi", 5, 2, -1, 1, 4, -1)]
    parts.append(u64(len(STRINGS)))
    for index, text in enumerate(STRINGS):
        parts += [u64(1000 + index, len(text)), text.encode()]
    parts += [u64(1), u64(9000, 1008), u64(1), u64(42, 1005)]
    parts += [u64(1), u64(1, 2, 3), u64(2, 42, 43), u64(1, 99)]
    main = row(None) + row(0) + row(1) + struct.pack("<II", 7, 0)
    parts += [u64(1), u64(500), main, u64(2), u64(0, 500)]
    compiled = row(2) + row(2) + row(1) + struct.pack("<II", 8, 0)
    helper = row(None) + row(4) + row(1) + struct.pack("<II", 9, 0)
    parts += [u64(2), compiled, helper]
    parts += [u64(1), struct.pack("<hQ", 1, 3), u64(0)]
    parts += [u64(1), bytes(27), u64(2), bytes(16), u64(3), bytes(36)]  # A lock, its threads and its times.
    parts += [u64(1), u64(1), struct.pack("<q", 12), row(7), bytes(7)]
    # Notes: none, and a name of a zone's own.
    parts += [u64(2), bytes(12), u24(0) + u24(0) + u24(4) + u24(0)]
    written = sum(1 for roots in threads.values() for root in roots for _ in root)
    parts.append(u64(written if promised is None else promised, 0, len(threads)))
    for thread, roots in threads.items():
        parts.append(struct.pack("<QQQBi", thread, 0, 0, 0, 0) + (timeline or cpu_zones(roots, Steps())))
        parts += [u64(1), bytes(8), u64(2), bytes(22), u64(1), bytes(11)]
    parts.append(u64(sum(1 for root in gpu or [] for node in root if node.start >= 0), 0, 0 if gpu is None else 1))
    if gpu is not None:
        parts += [struct.pack("<QBQfB", 42, 0, 1, 1.0, 2), u24(7), u64(0), u64(1), u64(42)]
        parts.append(gpu_zones(gpu, Steps(), Steps()))
    parts.append(bytes(200))  # What follows is not read.
    return b"".join(parts)


def cpu_zones(nodes: list[Node], steps: Steps) -> bytes:
    parts = [struct.pack("<I", len(nodes))]
    for node in nodes:
        parts += [struct.pack("<h", node.location), steps(node.start), struct.pack("<I", node.note)]
        parts += [cpu_zones(node.children, steps), steps(node.end)]
    return b"".join(parts)


def gpu_zones(nodes: list[Node], sent: Steps, steps: Steps) -> bytes:
    parts = [u64(len(nodes))]
    for node in nodes:
        parts += [sent(1), steps(node.start), struct.pack("<h", node.location), bytes(5)]
        parts += [gpu_zones(node.children, sent, steps), sent(1), steps(node.end)]
    return b"".join(parts)


def container(data: bytes, streams: int = 3, block: int = 100) -> bytes:
    packers = [zstandard.ZstdCompressor().compressobj() for _ in range(streams)]
    parts = [b"tr\xfdP", bytes((1, streams))]
    for index, begin in enumerate(range(0, len(data), block)):
        packer = packers[index % streams]
        packed = packer.compress(data[begin : begin + block]) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        parts += [struct.pack("<I", len(packed)), packed]
    return b"".join(parts)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file from zones; options as for `payload`."""

    def write(*args: object, **options: object) -> Path:
        file = tmp_path / "hand.tracy"
        file.write_bytes(container(payload(*args, **options)))  # type: ignore[arg-type]
        return file

    return write


def random_zones(rng: random.Random, start: int, depth: int) -> tuple[list[Node], int]:
    """Some zones side by side, in which there are others."""
    nodes = []
    for _ in range(rng.choice((1, 2, 3, 17, 40))):
        node = Node(start + 1, 0, rng.choice((1, -1, -2)), rng.choice((0, 1)))
        inside = node.start
        if depth and rng.random() < 0.2:
            node.children, inside = random_zones(rng, node.start, depth - 1)
        node.end = start = inside + rng.randrange(1, 9)
        nodes.append(node)
    return nodes, start


NAMES = {1: "main", -1: "compiled", -2: "iree_helper"}


def test_a_file_tells_what_was_written(write: Callable[..., Path]) -> None:
    read = read_tracy(write({42: [Node(10, 30, children=[Node(12, 20, -1)])]}))
    assert (read.program, read.pid, read.host["CPU cores"]) == ("prog", 77, "3")
    assert [(thread.id, thread.name) for thread in read.threads] == [(42, "worker")]
    assert [(message.time_ns, message.text) for message in read.messages] == [(12, "hello")]
    assert {name: frames.tolist() for name, frames in read.frames.items()} == {
        "Frame": [[5, 15], [15, -1]],
        "frames": [[5, 7], [8, 12]],
    }
    assert [str(read.locations[row]) for row in read.cpu_zones.location] == ["main.cc:7", "main.cc:8"]
    assert read.cpu_zones.self_ns.tolist() == [12, 8]


@pytest.mark.parametrize("seed", range(5))
def test_zones_are_those_that_were_written(write: Callable[..., Path], seed: int) -> None:
    rng = random.Random(seed)
    threads = {thread: random_zones(rng, thread, 4)[0] for thread in (42, 43)}
    read = read_tracy(write(threads))
    expected = [
        (node.start, node.end, thread, "own name" if node.note else NAMES[node.location])
        for thread, roots in enumerate(threads.values())
        for root in roots
        for node in root
    ]
    zones = read.cpu_zones
    got = zip(zones.start.tolist(), zones.end.tolist(), zones.thread.tolist(), zones.name.tolist(), strict=True)
    assert [(start, end, thread, read.names[name]) for start, end, thread, name in got] == expected
    nodes = [node for roots in threads.values() for root in roots for node in root]
    row_of = {id(node): row for row, node in enumerate(nodes)}
    for row, node in enumerate(nodes):
        assert np.flatnonzero(zones.parent == row).tolist() == [row_of[id(child)] for child in node.children]
        inside = sum(child.end - child.start for child in node.children)
        assert zones.self_ns[row] == node.end - node.start - inside


def test_totals_by_name_and_place(write: Callable[..., Path]) -> None:
    durations = (9, 1, 5, 2)
    zones = [Node(100 * index, 100 * index + length, -1) for index, length in enumerate(durations, 1)]
    zones[0].children = [Node(102, 105)]
    read = read_tracy(write({42: zones}))
    compiled, main = total_zones(read, 3)
    assert (compiled.process, compiled.name, compiled.source, compiled.count) == (3, "compiled", "main.cc:8", 4)
    assert (compiled.total_ns, compiled.self_ns) == (17, 14)
    assert (compiled.min_ns, compiled.median_ns, compiled.max_ns) == (1, 3, 9)
    assert (main.name, main.count, main.median_ns) == ("main", 1, 3)


def test_zones_that_never_ended_have_no_duration(write: Callable[..., Path]) -> None:
    read = read_tracy(write({42: [Node(10, -1, children=[Node(12, 20, -1), Node(25, -1)])]}))
    assert read.cpu_zones.has_ended.tolist() == [False, True, False]
    assert read.cpu_zones.duration_ns.tolist() == [0, 8, 0]
    assert [total.name for total in total_zones(read, 0)] == ["compiled"]


def test_zones_by_name(write: Callable[..., Path]) -> None:
    read = read_tracy(write({42: [Node(1, 2, -1), Node(3, 4), Node(5, 6, -2)]}))
    assert read.zones("*m*").start.tolist() == [1, 3]
    assert read.zones("nothing").start.tolist() == []
    assert len(read.zones()) == 3


def test_zones_of_a_gpu(write: Callable[..., Path]) -> None:
    # The second was never timed by the device.
    gpu = [Node(50, 90, -1, children=[Node(60, 70, -2)]), Node(-1, -1, -1)]
    read = read_tracy(write({42: [Node(1, 2)]}, gpu))
    assert [context.name for context in read.gpu_contexts] == ["GPU queue"]
    assert (read.gpu_zones.start.tolist(), read.gpu_zones.end.tolist()) == ([50, 60, -1], [90, 70, -1])
    assert [(total.name, total.source) for total in total_zones(read, 0)] == [
        ("compiled", "GPU queue, main.cc:8"),
        ("iree_helper", "GPU queue, main.cc:9"),
        ("main", "main.cc:7"),
    ]
    assert [(run.key, run.duration_ns) for run in find_dispatches(read)] == [("compiled", 40)]


@pytest.mark.timed
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_million_zones_take_seconds(tmp_path: Path, is_nested: bool) -> None:
    roots = 500_000 if is_nested else 1_000_000
    leaf = struct.pack("<hqIIq", -1, 1, 0, 0, 2)
    one = struct.pack("<hqII", 1, 1, 0, 1) + leaf + struct.pack("<q", 3) if is_nested else leaf
    timeline = struct.pack("<I", roots) + one * roots
    file = tmp_path / "many.tracy"
    file.write_bytes(container(payload({42: []}, promised=1_000_000, timeline=timeline), block=1 << 16))
    start = time.perf_counter()
    read = read_tracy(file)
    totals = total_zones(read, 0)
    # A fifth of that on a machine that has nothing else to do.
    assert time.perf_counter() - start < 5
    sums = {total.name: (total.count, total.total_ns, total.self_ns) for total in totals}
    nested = {"main": (500_000, 3_000_000, 2_000_000), "compiled": (500_000, 1_000_000, 1_000_000)}
    assert sums == (nested if is_nested else {"compiled": (1_000_000, 2_000_000, 2_000_000)})


def test_a_file_without_zones(write: Callable[..., Path]) -> None:
    read = read_tracy(write({}))
    assert (len(read.zones()), total_zones(read, 0), find_dispatches(read)) == (0, [], [])


@pytest.mark.parametrize("version", [(0, 11, 1), (0, 12, 0), (1, 11, 2)])
def test_another_version_is_refused(write: Callable[..., Path], version: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match=rf"of Tracy {'.'.join(map(str, version))}; this program reads 0\.11\.2"):
        read_tracy(write({42: [Node(1, 2)]}, version=version))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a Tracy file"),
        (b"\x7fELF and so on", "not a Tracy file"),
        (b"tr\xfdP\x01", "not a Tracy file"),
        (b"tlZ\x04........", "older than 0.11.2"),
        (b"tr\xfdP\x00\x04....", "compressed with lz4; this program reads zstd"),
        (b"tr\xfdP\x07\x04....", "compressed with codec 7"),
        (container(b"another payload, long enough"), "not a Tracy file"),
        (b"tr\xfdP\x01\x01\x04\x00\x00\x00abcd", "block 0 is damaged"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "foreign.tracy"
    file.write_bytes(data)
    with pytest.raises(CaptureError, match=message) as error:
        read_tracy(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="No such file"):
        read_tracy(tmp_path / "missing.tracy")


@pytest.mark.parametrize(
    ("zones", "options", "message"),
    [
        ([Node(1, 2, location=2)], {}, "source location"),
        ([Node(1, 2, location=-3)], {}, "source location"),
        ([Node(1, 2, note=2)], {}, "note 2, there are 2"),
        ([Node(1, 2)], {"promised": 7}, "holds 1 zones, its header says 7"),
    ],
)
def test_references_past_the_tables_are_refused(
    write: Callable[..., Path], zones: list[Node], options: dict[str, int], message: str
) -> None:
    with pytest.raises(CaptureError, match=f"torn: .*{message}"):
        read_tracy(write({42: zones}, **options))


def test_a_file_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    zones = random_zones(random.Random(1), 0, 3)[0]
    data = payload({42: zones}, [Node(1, 2)])
    whole = container(data)
    file = tmp_path / "cut.tracy"
    for length in range(len(data) - 200):
        file.write_bytes(container(data[:length], block=1 << 16))
        with pytest.raises(CaptureError, match=r"torn|not a Tracy file"):
            read_tracy(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(CaptureError, match="torn: it ends inside block"):
        read_tracy(file)


def test_damage_is_refused_or_read_but_never_fatal(tmp_path: Path) -> None:
    rng = random.Random(5)
    data = payload({42: random_zones(rng, 0, 3)[0]}, [Node(1, 2)])
    file = tmp_path / "damaged.tracy"
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(8, len(damaged))] = rng.choice((0, 1, 127, 128, 255))
        file.write_bytes(container(bytes(damaged), block=1 << 16))
        try:
            read = read_tracy(file)
        except CaptureError:
            continue
        total_zones(read, 0)
        find_dispatches(read)


@dataclass(frozen=True)
class Recording:
    trace: TracyFile
    profile: list[dict[str, int | str]]


@pytest.fixture(scope="module", params=["local-task", "local-sync"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One run, recorded by Tracy and by the runtime's own profiler at once."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    module, trace, profile = folder / "module.vmfb", folder / "x.tracy", folder / "x.ireeprof"
    tools.compile_str(MODULE, output_file=str(module), extra_args=[*flags, "--iree-llvmcpu-target-cpu=host"])
    command = [
        str(find_tracy_tool("iree-benchmark-module")),
        f"--module={module}",
        f"--device={request.param}",
        "--function=main",
        "--input=128x512xf32=0.1",
        "--input=512x512xf32=0.2",
        "--input=512x2048xf32=0.3",
        f"--benchmark_min_time={CALLS}x",
        "--device_profiling_mode=queue-events,host-execution,executable-metadata",
        f"--device_profiling_output={profile}",
    ]
    assert record_tracy(command, trace, timeout_s=60).problem is None
    summary = [str(find_tracy_tool("iree-profile")), "dispatch", str(profile), "--format=jsonl"]
    lines = subprocess.run(summary, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    return Recording(read_tracy(trace), [row for row in rows if row["type"] == "host_dispatch_group"])


@pytest.mark.timed
@needs_tracy
def test_dispatches_are_those_of_the_profiler(recording: Recording) -> None:
    runs = find_dispatches(recording.trace)
    square, wide = sorted(recording.profile, key=lambda row: row["key"])
    assert (square["count"], wide["count"]) == (2 * CALLS, CALLS)  # The same export twice in a row.
    for row in (square, wide):
        of_key = [run for run in runs if run.key == row["key"]]
        assert len(of_key) == row["count"]
        assert sum(run.duration_ns for run in of_key) == pytest.approx(row["total_ns"], rel=0.02)
        tile_ns = sum(run.tile_ns for run in of_key)
        assert tile_ns == pytest.approx(row["total_tile_duration_sum_ns"], rel=0.02)


@pytest.mark.timed
@needs_tracy
def test_own_times_add_up_to_the_outermost_zones(recording: Recording) -> None:
    zones = recording.trace.zones()
    assert len(zones) > 1000
    outermost = zones.parent < 0
    # In few cases the clocks of two cores differ, so that a zone seems longer than the one around it.
    assert zones.self_ns.sum() == pytest.approx(zones.duration_ns[outermost].sum(), rel=1e-3)
    totals = total_zones(recording.trace, 0)
    assert sum(total.count for total in totals) == zones.has_ended.sum()
    assert sum(total.total_ns for total in totals) == zones.duration_ns.sum()


@pytest.mark.timed
@needs_tracy
def test_frames_and_threads_of_a_program(recording: Recording) -> None:
    assert recording.trace.program == "iree-benchmark-module"
    assert len(recording.trace.frames["Iteration"]) == CALLS
    assert "Main thread" in {thread.name for thread in recording.trace.threads}
