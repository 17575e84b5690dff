"""Profiles: rows add up to what iree-profile says itself, and damaged files are refused."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmir_iree.tracing import ireeprof
from llmir_iree.tracing.capture import Call, Capture, CaptureError, DispatchRun
from llmir_iree.tracing.ireeprof import read_ireeprof, read_totals
from tests.tracing.conftest import PROCESSES, RUNS


def test_sums_are_those_of_iree_profile(small_capture: Capture) -> None:
    files = small_capture.profiles("ireeprof")
    assert len(files) == PROCESSES
    for process, file in enumerate(files):
        runs = [run for run in small_capture.read(DispatchRun) if run.process == process]
        sums: dict[str, Counter[str]] = {}
        for run in runs:
            row = {"count": 1, "total_ns": run.duration_ns, "tile_ns": run.tile_ns, "tiles": run.tiles}
            sums.setdefault(run.key, Counter()).update(row)
        assert {key: vars(total) for key, total in read_totals(file).items()} == sums


def test_every_call_has_its_dispatches_in_order(small_capture: Capture) -> None:
    calls = small_capture.read(Call)
    assert len(calls) == PROCESSES * (RUNS + 1)
    runs = small_capture.read(DispatchRun)
    for call in calls:
        of_call = [run for run in runs if (run.process, run.call) == (call.process, call.call)]
        assert [run.site for run in of_call] == [0, 1]
        assert [run.key.split("_")[3] for run in of_call] == ["matmul", "softmax"]
        assert call.start_ns <= of_call[0].start_ns
        assert of_call[1].start_ns + of_call[1].duration_ns <= call.start_ns + call.wall_ns
    assert all(later.start_ns >= call.start_ns + call.wall_ns for call, later in _neighbours(calls))


def test_submissions_that_do_not_divide_into_calls_stand_for_themselves(small_capture: Capture) -> None:
    file = small_capture.profiles("ireeprof")[0]
    assert len(read_ireeprof(file, process=0, function="main", calls=RUNS).calls) == RUNS + 1


@pytest.mark.parametrize("kept", [0, 40, 5000])
def test_a_truncated_profile_is_refused(small_capture: Capture, tmp_path: Path, kept: int) -> None:
    torn = tmp_path / "torn.ireeprof"
    torn.write_bytes(small_capture.profiles("ireeprof")[0].read_bytes()[:kept])
    with pytest.raises(CaptureError, match=r"torn\.ireeprof: truncated, or not a profile of IREE's"):
        read_ireeprof(torn, process=0, function="main")
    with pytest.raises(CaptureError, match="truncated"):
        read_totals(torn)


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such profile"):
        read_ireeprof(tmp_path / "none.ireeprof", process=0, function="main")


def test_another_schema_is_refused(small_capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ireeprof, "EXPORT_SCHEMA", 14)
    with pytest.raises(CaptureError, match="exports schema 15; this program reads 14"):
        read_ireeprof(small_capture.profiles("ireeprof")[0], process=0, function="main")


def test_dispatches_that_a_device_timed_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def row(submission: int, start: int, valid: bool = True) -> dict[str, Any]:
        return {
            "record_type": "dispatch_event",
            "event_id": submission,
            "submission_id": submission,
            "command_index": 0,
            "key": "main_dispatch_0",
            "workgroup_count": [4, 2, 1],
            "valid": valid,
            "derived_time_available": True,
            "start_driver_host_cpu_time_ns": start,
            "end_driver_host_cpu_time_ns": start + 50,
            "duration_ns": 50,
        }

    rows = [row(1, 100), row(2, 200), row(3, 300, valid=False)]
    monkeypatch.setattr(ireeprof, "_export", lambda _file, _timeout: rows)
    profile = read_ireeprof(tmp_path, process=0, function="main", calls=3)
    assert [(run.call, run.start_ns, run.duration_ns, run.tile_ns, run.tiles) for run in profile.runs] == [
        (0, 100, 50, 50, 8),
        (1, 200, 50, 50, 8),
    ]
    assert profile.invalid == 1


def test_a_profile_without_dispatches_says_how_to_record_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ireeprof, "_export", lambda _file, _timeout: [{"record_type": "session"}])
    with pytest.raises(CaptureError, match="--device_profiling_mode=queue-events,host-execution"):
        read_ireeprof(tmp_path, process=0, function="main")


def _neighbours(calls: list[Call]) -> list[tuple[Call, Call]]:
    return [(a, b) for a, b in pairwise(calls) if a.process == b.process]
