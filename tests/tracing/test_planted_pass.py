"""A pass of the plugin turned off: recorded in turns, the comparison leads from the dispatches to the pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmir_iree.build import BuildOptions, build_bundle
from llmir_iree.bundle import Bundle
from llmir_iree.cli.trace import main
from llmir_iree.compile import compile_bundle
from llmir_iree.targets import resolve_target

PASS = "merge-sibling-matmuls"
LAYERS = 2


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small bundle, and the same compiled without the pass."""
    folder, target = tmp_path_factory.mktemp("planted"), resolve_target("llvm-cpu")
    checkpoint = str(tiny_checkpoint("llama", num_hidden_layers=LAYERS, intermediate_size=256))
    whole = build_bundle(
        BuildOptions(checkpoint, folder / "whole", quant="q8_0", batch_sizes=(1,), targets=(target,))
    ).folder
    without = shutil.copytree(whole, folder / "without")
    compile_bundle(Bundle.open(without), target, passes=(f"-{PASS}",))
    return whole, without


@pytest.mark.timed
def test_a_pass_turned_off_is_named(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (str(tmp_path / name) for name in ("a.llmtrace", "b.llmtrace"))
    whole, without = map(str, bundles)
    counts = ("--runs", "20", "--processes", "3", "--context", "32", "--device", "local-sync", "--quiet")
    done = CliRunner().invoke(main, ["record", whole, "-o", a, "--against", without, b, *counts])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["diff", a, b, "--explain", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert f"passes of the plugin only in A: {PASS}; only in B: none" in found["notes"]
    [function] = found["functions"]
    assert function["took_turns"]
    sides = {row["label"]: row["side"] for row in function["rows"] if row["matches"]}
    # One matmul of gate and up in each layer has become two.
    assert sides[f"{LAYERS} x gated_matmul 1x512x64"] == "a"
    assert sides[f"{2 * LAYERS} x quantized_matmul 1x256x64"] == "b"
    explained = [entry for entry in found["explanations"] if sides[entry["label"]] != "both"]
    assert explained
    for entry in explained:
        assert entry["reason"].endswith(f"first parts at the passes of the plugin: only A ran {PASS}")
