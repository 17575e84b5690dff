"""llmir-export and llmir-compile: what they print, and what the manifest then says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from click.testing import CliRunner

from llmir_iree.bundle import Bundle, CacheDtype
from llmir_iree.cli import compile as compile_cli
from llmir_iree.cli import export as export_cli
from llmir_iree.export import trace
from llmir_iree.params.plan import QUANT_CHOICES
from llmir_iree.plugins.pipeline import PIPELINE


def test_choices_are_those_of_the_library() -> None:
    """The command line repeats them, so that --help need not import torch."""
    assert export_cli.QUANT_CHOICES == QUANT_CHOICES
    assert export_cli.CACHE_DTYPES == get_args(CacheDtype) == get_args(trace.CacheDtype) == tuple(trace.CACHE_DTYPES)


def test_export_then_compile_again(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    source = str(tiny_checkpoint("llama", num_hidden_layers=1))
    exported = CliRunner().invoke(
        export_cli.main, [source, "-o", str(output), "--batch", "2", "--quant", "q8_0", "--no-compile", "--json"]
    )
    assert exported.exit_code == 0, exported.output
    manifest = json.loads(exported.stdout)
    assert manifest["targets"] == {}
    assert manifest["parameters"]["formats"] == {"f32": 1, "q8_0": 8}
    assert manifest["parameters"]["merged"] == {
        f"model.layers.0.{parent}.{'+'.join(modules)}.weight": [
            f"model.layers.0.{parent}.{module}.weight" for module in modules
        ]
        for parent, modules in {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}.items()
    }
    assert "f32 -> q8_0: 8 tensors" in exported.stderr
    assert "no tokenizer in the bundle" in exported.stderr

    flag = "--iree-llvmcpu-stack-allocation-limit=65536"
    compiled = CliRunner().invoke(compile_cli.main, [str(output), "-v", "--", flag])
    assert compiled.exit_code == 0, compiled.output
    for phase in ("prefill", "decode"):
        [line] = [line for line in compiled.stderr.splitlines() if f"llvm-cpu {phase}: iree-compile" in line]
        info = Bundle.open(output).target("llvm-cpu").modules[phase]
        assert line.endswith(" ".join(info.flags))
        assert info.flags[-1] == flag
        assert info.passes == tuple(step.name for step in PIPELINE if not step.on_request)


def test_an_older_bundle_is_replaced_whole(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = str(tiny_checkpoint("llama", num_hidden_layers=1))
    arguments = [source, "-o", str(tmp_path / "bundle"), "--batch", "1", "--no-compile", "--quiet"]
    assert CliRunner().invoke(export_cli.main, arguments).exit_code == 0
    (tmp_path / "bundle" / "stale.txt").write_text("of the older bundle")
    assert CliRunner().invoke(export_cli.main, [*arguments, "--page-size", "16"]).exit_code == 0
    assert Bundle.open(tmp_path / "bundle").manifest.cache.page_size == 16
    assert not (tmp_path / "bundle" / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_the_list_of_passes() -> None:
    passes = CliRunner().invoke(compile_cli.main, ["--list-passes"]).stdout
    assert [line.split()[0] for line in passes.splitlines()] == [step.name for step in PIPELINE]
