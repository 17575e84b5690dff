"""Slowdowns that were planted in a small module: the comparison names the dispatch, and the pass that made it slow."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmir_iree.cli.trace import main
from llmir_iree.tracing.capture import Capture, DispatchRun, write_rows
from tests.tracing.tuning import TUNING_PASS, bad_tiles

MODULE = """
func.func @main(%x: tensor<64x256xf32>, %w: tensor<256x512xf32>, %v: tensor<512x384xf32>) -> tensor<64x384xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<64x512xf32>
  %init = linalg.fill ins(%zero : f32) outs(%empty : tensor<64x512xf32>) -> tensor<64x512xf32>
  %first = linalg.matmul ins(%x, %w : tensor<64x256xf32>, tensor<256x512xf32>) outs(%init : tensor<64x512xf32>)
      -> tensor<64x512xf32>
  %weights = linalg.softmax dimension(1) ins(%first : tensor<64x512xf32>) outs(%empty : tensor<64x512xf32>)
      -> tensor<64x512xf32>
  %out = tensor.empty() : tensor<64x384xf32>
  %out_init = linalg.fill ins(%zero : f32) outs(%out : tensor<64x384xf32>) -> tensor<64x384xf32>
  %second = linalg.matmul ins(%weights, %v : tensor<64x512xf32>, tensor<512x384xf32>)
      outs(%out_init : tensor<64x384xf32>) -> tensor<64x384xf32>
  return %second : tensor<64x384xf32>
}
"""
INPUTS = ("64x256xf32=0.1", "256x512xf32=0.1", "512x384xf32=0.1")
SLOW = "matmul_like 64x384x512"

pytestmark = pytest.mark.timed


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Sequence[str]], tuple[Path, Path]]:
    """Records the module, in turns as it is and compiled with more flags.

    Captures that were recorded one after the other leave open whether the machine slowed down where most dispatches
    did alike, as they may on another processor.
    """
    folder = tmp_path_factory.mktemp("explain")
    module = folder / "module.mlir"
    module.write_text(MODULE)
    (folder / "spec.mlir").write_text(bad_tiles("linalg.generic", "tensor<512x384xf32>", "[8, 8, 0]"))

    def run(name: str, flags: Sequence[str]) -> tuple[Path, Path]:
        outputs = folder / f"{name}-a.llmtrace", folder / f"{name}-b.llmtrace"
        inputs = [argument for value in INPUTS for argument in ("--input", value)]
        options = ["--device", "local-sync", "--runs", "40", "--processes", "4", "--quiet", "-o", str(outputs[0])]
        against = ["--against", str(module), str(outputs[1])]
        against += [f"--against-flag={flag.replace('SPEC', str(folder / 'spec.mlir'))}" for flag in flags]
        done = CliRunner().invoke(main, ["record", str(module), *inputs, *options, *against])
        assert done.exit_code == 0, done.output
        return outputs

    return run


@pytest.fixture(scope="module")
def tuned(record: Callable[[str, Sequence[str]], tuple[Path, Path]]) -> tuple[Path, Path]:
    return record("tuned", ["--iree-codegen-tuning-spec-path=SPEC"])


@pytest.fixture(scope="module")
def base(tuned: tuple[Path, Path]) -> Path:
    return tuned[0]


def compare(a: Path, b: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["diff", str(a), str(b), "--explain", *options])


def explanation(done: Result, label: str) -> dict[str, Any]:
    found = {entry["label"]: entry for entry in json.loads(done.stdout)["explanations"]}
    assert label in found
    entry: dict[str, Any] = found[label]
    return entry


def test_a_bad_tile_size(tuned: tuple[Path, Path]) -> None:
    done = compare(*tuned, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    [function] = result["functions"]
    assert function["rows"][0]["label"] == SLOW
    assert function["rows"][0]["share"] > 0.8
    found = explanation(done, SLOW)
    assert found["pass"] == TUNING_PASS
    assert "-> [1, 2, 0]" in found["reason"]
    assert f"of it in {SLOW} (workgroups " in result["summary"][0]
    assert "-> [1, 2, 0]" in result["summary"][0]
    gate = compare(*tuned, "--fail-if-slower", "20")
    assert gate.exit_code == 1
    assert f"first parts at {TUNING_PASS}, which only B ran" in gate.stdout


def test_another_processor(record: Callable[[str, Sequence[str]], tuple[Path, Path]]) -> None:
    done = compare(*record("generic", ["--iree-llvmcpu-target-cpu=generic"]), "--json")
    assert done.exit_code == 0, done.output
    assert "flags only in A: none; only in B: --iree-llvmcpu-target-cpu=generic" in json.loads(done.stdout)["notes"]
    found = explanation(done, SLOW)
    assert found["pass"] == "iree-llvmcpu-select-lowering-strategy"
    assert "vector_common_parallel" in found["hunk"]


def test_nothing_changed(base: Path) -> None:
    done = compare(base, base)
    assert done.exit_code == 0, done.output
    assert "no change of the whole is called" in done.stdout
    assert "first parts at" not in done.stdout


def test_a_dispatch_is_explained_by_its_own_ir_alone(base: Path, tmp_path: Path) -> None:
    """An export that the IR lacks is not taken for another one whose name holds its own."""
    a, b = (Capture.open(shutil.copytree(base, tmp_path / f"{side}.llmtrace")) for side in "ab")
    known = next(run.key for run in a.read(DispatchRun) if "softmax" in run.key)
    for capture, slowness in ((a, 1), (b, 50)):
        runs = [
            run.model_copy(update={"key": "softmax", "duration_ns": run.duration_ns * slowness})
            if run.key == known
            else run
            for run in capture.read(DispatchRun)
        ]
        write_rows(capture.folder, DispatchRun, runs)
    found = json.loads(compare(a.folder, b.folder, "--json").stdout)["explanations"]
    assert [entry["reason"] for entry in found] == [f"{a.folder}: its IR holds no dispatch softmax"]


def test_a_pass_of_the_plugin(base: Path, tmp_path: Path) -> None:
    """Another plugin's pass gave iree-compile another module, so that a dispatch of A does not exist in B."""
    captures = [Capture.open(shutil.copytree(base, tmp_path / f"{side}.llmtrace")) for side in "ab"]
    changed = [
        Capture.create(capture.folder, capture.manifest.model_copy(update={"passes": passes}))
        for capture, passes in zip(captures, (("fold-silu-mul", "split-argmax"), ("split-argmax",)), strict=True)
    ]
    kept = [run for run in changed[1].read(DispatchRun) if "softmax" not in run.key]
    write_rows(changed[1].folder, DispatchRun, kept)
    done = compare(changed[0].folder, changed[1].folder)
    assert done.exit_code == 0, done.output
    told = "only A has this dispatch: first parts at the passes of the plugin: only A ran fold-silu-mul"
    assert told in done.stdout
