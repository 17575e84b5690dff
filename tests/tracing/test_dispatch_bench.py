"""A dispatch that runs alone: with what was recorded, and nothing else."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import pytest
from click.testing import CliRunner, Result

from llmir_iree.cli.trace import main
from llmir_iree.tracing.capture import Capture, CaptureError, DispatchRun, write_rows
from llmir_iree.tracing.dispatch_bench import BenchOptions, bench_dispatch

QUICK = ("--repetitions", "2", "--min-time", "0.01")


def bench(capture: Capture, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", str(capture.folder), *arguments, *QUICK])


@pytest.fixture
def copied(small_capture: Capture, tmp_path: Path) -> Callable[[], Capture]:
    """Copies of the small capture, which may be damaged."""

    def copy() -> Capture:
        return Capture.open(copytree(small_capture.folder, tmp_path / "copy.llmtrace"))

    return copy


@pytest.mark.timed
@pytest.mark.parametrize("name", ["*matmul*", "matmul"])
def test_runs_with_what_was_recorded(small_capture: Capture, name: str) -> None:
    done = bench(small_capture, name, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    run = next(run for run in small_capture.read(DispatchRun) if "matmul" in run.key)
    assert (found["site"], found["key"], tuple(found["workgroups"])) == (run.site, run.key, run.workgroups)
    # [256, 768] and [768, 512] of f32 come in, [256, 512] goes out; the dimension that varies is a constant.
    assert found["bindings"] == [4 * 256 * 768, 4 * 768 * 512, 4 * 256 * 512]
    assert 768 in found["constants"]
    assert len(found["times_ns"]) == 2
    assert found["ratio"] == pytest.approx(found["median_ns"] / found["recorded_ns"])
    assert 0.1 < found["ratio"] < 10


def test_a_site_may_be_named_by_its_number(small_capture: Capture) -> None:
    done = bench(small_capture, "1")
    assert done.exit_code == 0, done.output
    assert "softmax" in done.stdout
    assert "alone it takes" in done.stdout


def test_a_name_that_matches_nothing_or_too_much(small_capture: Capture) -> None:
    done = bench(small_capture, "softmaks")
    assert done.exit_code == 2
    assert "no dispatch matches 'softmaks'; the nearest: main" in done.stderr
    done = bench(small_capture, "main*")
    assert done.exit_code == 2
    assert "matches 2 different dispatches; name one by its site: 0 (matmul" in done.stderr


def test_another_module_is_refused(small_capture: Capture, tmp_path: Path) -> None:
    """One that differs in a byte may have other workgroups; the recorded one is taken."""
    [binary] = (small_capture.ir / "binaries").glob("*.so")
    for changed in (b"", b"\0"):
        module = tmp_path / "module.vmfb"
        with zipfile.ZipFile(module, "w") as archive:
            archive.writestr(binary.name, binary.read_bytes() + changed)
        done = bench(small_capture, "softmax", "--module", str(module))
        assert done.exit_code == (2 if changed else 0), done.output
        assert ("not the module that was recorded; its workgroups may cover other parts" in done.stderr) == bool(
            changed
        )


def test_a_module_is_known_by_its_hash(copied: Callable[[], Capture], tmp_path: Path) -> None:
    """A capture that holds no machine code takes only the module whose hash it has."""
    capture = copied()
    rmtree(capture.ir / "binaries")
    module = tmp_path / "module.vmfb"
    with zipfile.ZipFile(module, "w") as archive:
        archive.writestr("a.so", b"")
    with pytest.raises(CaptureError, match="holds 0 binaries, bench needs one; name the module"):
        bench_dispatch(capture, "softmax")
    with pytest.raises(CaptureError, match="not the module that was recorded"):
        bench_dispatch(capture, "softmax", BenchOptions(module))


def test_sizes_that_are_not_known_are_refused(small_capture: Capture) -> None:
    shapeless = Capture(small_capture.folder, small_capture.manifest.model_copy(update={"shapes": ()}))
    with pytest.raises(CaptureError, match="does not tell the size of all it is passed: buffer 0, buffer 1, constant"):
        bench_dispatch(shapeless, "matmul")


def test_captures_that_lack_something_are_refused(copied: Callable[[], Capture]) -> None:
    capture = copied()
    runs = capture.read(DispatchRun)
    last = runs[-1].model_copy(update={"workgroups": (1, 2, 3)})
    write_rows(capture.folder, DispatchRun, [*runs[:-1], last])
    with pytest.raises(CaptureError, match="recorded with 2 different workgroup counts"):
        bench_dispatch(capture, last.key)
    other = [run.model_copy(update={"workgroups": (1, 2, 3)}) for run in runs]
    write_rows(capture.folder, DispatchRun, other)
    with pytest.raises(CaptureError, match=r"was recorded with 1x2x3 workgroups, and its export declares \d+x\d+x1;"):
        bench_dispatch(capture, "0")
    moved = [run.model_copy(update={"key": "other"}) for run in runs]
    write_rows(capture.folder, DispatchRun, moved)
    with pytest.raises(CaptureError, match="dispatch 0 was other, and the IR has main"):
        bench_dispatch(capture, "0")
    rmtree(capture.ir / "phases")
    with pytest.raises(CaptureError, match="holds 0 modules at stream level"):
        bench_dispatch(capture, "0")
    with pytest.raises(CaptureError, match="recorded on cuda"):
        bench_dispatch(Capture(capture.folder, capture.manifest.model_copy(update={"device": "cuda"})), "0")


@pytest.mark.parametrize("options", [{"repetitions": 0}, {"min_time_s": 0.0}, {"timeout_s": -1.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(CaptureError, match="more than 0"):
        BenchOptions(**options)  # type: ignore[arg-type]
