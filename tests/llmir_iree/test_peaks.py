"""The peaks are a machine's: plausible, and no smaller than what plain numpy reaches."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmir_iree import peaks
from llmir_iree.machine import cpu_count
from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.kernels.peaks import PRODUCTS


@pytest.fixture(scope="module")
def meter() -> peaks.PeakMeter:
    found = peaks.open_peak_meter()
    assert found is not None, "no kernels for this machine, or none compiled"
    return found


def numpy_bandwidth() -> float:
    """Bytes a second that the maximum of a large array is found at, by all cores."""
    shares = np.array_split(np.ones(96 << 17, np.int64), cpu_count())
    with ThreadPoolExecutor(len(shares)) as pool:
        seconds = peaks._time_passes(lambda: list(pool.map(np.max, shares)))
    return sum(share.nbytes for share in shares) / min(seconds)


def numpy_macs() -> float:
    """Products of integers a second that numpy does on one core, one at a time."""
    matrix = np.ones((128, 128), np.int32)
    return matrix.size * len(matrix) / min(peaks._time_passes(lambda: matrix @ matrix))


@pytest.mark.timed
def test_memory_is_read_as_fast_as_numpy_reads_it(meter: peaks.PeakMeter) -> None:
    # In turn, and the best of each: other processes disturb both.
    measured = [(meter.bandwidth().best, numpy_bandwidth()) for _ in range(3)]
    ours, reference = (max(values) for values in zip(*measured, strict=True))
    assert 0.8 * reference < ours < 10 * reference


@pytest.mark.timed
def test_bytes_are_multiplied_faster_than_numpy_multiplies_integers(meter: peaks.PeakMeter) -> None:
    # 4096 products a cycle at 4 GHz are more than any core does without an engine for matrices.
    assert numpy_macs() * cpu_count() < meter.macs().best < 16e12 * cpu_count()


def numpy_float_macs() -> float:
    """Products of floats a second that numpy does, on the cores that it uses."""
    matrix = np.ones((512, 512), np.float32)
    return matrix.size * len(matrix) / min(peaks._time_passes(lambda: matrix @ matrix))


@pytest.mark.timed
def test_floats_are_multiplied_as_fast_as_numpy_multiplies_them(meter: peaks.PeakMeter) -> None:
    # In turn, and the best of each. No library is faster than registers are, nor many times slower.
    measured = [(meter.macs("floats").best, numpy_float_macs()) for _ in range(3)]
    ours, reference = (max(values) for values in zip(*measured, strict=True))
    assert 0.9 * reference < ours < 20 * reference * cpu_count()


def test_a_measurement_takes_less_than_half_a_second(meter: peaks.PeakMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[float] = []
    ticks = iter(np.arange(0.0, 100.0, 0.11))
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: next(ticks))
    assert peaks._time_passes(lambda: passes.append(0)) == pytest.approx([0.11, 0.11])
    assert len(passes) == 1 + 2, "one to warm up, and passes until the patience is over"


def test_the_rate_is_what_was_done_by_the_time_it_took(
    meter: peaks.PeakMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "_time_passes", lambda run: [2.0, 6.0])
    for multiplied, products in PRODUCTS.items():
        macs = meter._workgroups * peaks._ROUNDS * products.macs_per_round
        assert meter.macs(multiplied) == peaks.Rate(best=macs / 2, mean=macs / 4)
    assert meter.bandwidth() == peaks.Rate(best=peaks._BUFFER_BYTES / 2, mean=peaks._BUFFER_BYTES / 4)
    file = tmp_path / "weights"
    with file.open("wb") as stream:
        stream.truncate(peaks._BUFFER_BYTES + 64 + 5)  # Not a whole number of vectors.
    assert meter.bandwidth(file).best == (peaks._BUFFER_BYTES + 64) / 2


def test_a_file_is_read_where_it_lies_and_never_written(
    meter: peaks.PeakMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as stream:
        stream.truncate(peaks._BUFFER_BYTES)
        stream.seek(peaks._BUFFER_BYTES - 1)
        stream.write(b"\x01")
    file.chmod(0o444)
    results = []
    call = meter._call
    monkeypatch.setattr(meter, "_call", lambda *arguments: results.append(call(*arguments)))
    monkeypatch.setattr(peaks, "_time_passes", lambda run: [run() or 1.0])
    meter.bandwidth(file)
    (seen,) = results
    assert seen.tolist() == [0] * (len(seen) - 1) + [1]


def test_a_small_file_would_measure_the_caches(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(mmap.PAGESIZE))
    assert len(peaks._memory(file)) == peaks._BUFFER_BYTES


def test_where_there_are_no_kernels_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_compile(_target: object) -> str:
        raise CompileError("no compiler")

    for replacement in (lambda _target: None, cannot_compile):
        peaks.open_peak_meter.cache_clear()
        monkeypatch.setattr(peaks, "peaks_module", replacement)
        assert peaks.measure_bandwidth() is None
    peaks.open_peak_meter.cache_clear()


def test_the_kernels_are_compiled_once() -> None:
    first = peaks.open_peak_meter()
    start = time.perf_counter()
    assert peaks.open_peak_meter() is first
    assert time.perf_counter() - start < 0.1
