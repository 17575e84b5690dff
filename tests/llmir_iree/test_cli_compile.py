"""llmir-compile --dump-ir: what it writes is small, is what llmir-trace ir reads, and comes whole or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmir_iree.build import BuildOptions, build_bundle
from llmir_iree.bundle import Bundle
from llmir_iree.cli import trace
from llmir_iree.cli.compile import main
from llmir_iree.params.errors import CompileError
from llmir_iree.tracing import ir_dump
from llmir_iree.tracing.capture import PASSES_NAME
from llmir_iree.tracing.ir_history import IrDump
from llmir_iree.tracing.recorded_modules import MODULE_NAME

PASS = "fold-silu-mul"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--quiet"], prog_name="llmir-compile")


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny model, not compiled."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    build_bundle(BuildOptions(str(tiny_checkpoint("llama")), folder, quant="q8_0", batch_sizes=(1,), targets=()))
    return folder


@pytest.fixture(scope="module")
def dumped(exported: Path) -> Path:
    """The IR of its compilation."""
    dump = exported.with_name("dump")
    done = run(exported, "--dump-ir", dump)
    assert done.exit_code == 0, done.output
    return dump


def test_a_dump_has_a_file_a_phase_and_how_it_was_made(exported: Path, dumped: Path) -> None:
    files = {str(file.relative_to(dumped)): file for file in dumped.rglob("*") if file.is_file()}
    assert set(files) == {f"{phase}/{name}" for phase in ("decode", "prefill") for name in (MODULE_NAME, PASSES_NAME)}
    assert files[f"decode/{PASSES_NAME}"].stat().st_size < 500_000
    modules = Bundle.open(exported).manifest.targets["llvm-cpu"].modules
    assert json.loads(files[f"decode/{MODULE_NAME}"].read_text()) == json.loads(modules["decode"].model_dump_json())
    assert not list(exported.parent.glob("*.partial"))
    assert {file.name for file in (exported / "llvm-cpu").iterdir()} == {"decode.vmfb", "prefill.vmfb"}


def test_a_dump_has_the_dispatches_of_both_programs(dumped: Path) -> None:
    dump = IrDump.open(dumped)
    assert [history.program for history in dump.programs] == ["decode", "prefill"]
    names = [history.name for history in dump.dispatches]
    assert any(name.startswith("decode/") for name in names)
    assert any(name.startswith("prefill/") for name in names)
    matmul = next(name for name in names if "matmul" in name and name.startswith("decode/"))
    done = CliRunner().invoke(trace.main, ["ir", str(dumped), matmul])
    assert done.exit_code == 0, done.output
    assert "iree-hal-conversion" in done.stdout


def test_ir_diff_tells_of_the_plugin(exported: Path, dumped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(exported, copy)
    assert run(copy, "--dump-ir", tmp_path / "other", "--passes", f"-{PASS}").exit_code == 0
    done = CliRunner().invoke(trace.main, ["ir-diff", str(dumped), str(tmp_path / "other")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"passes of the plugin that only A was compiled with: {PASS}"


def test_a_dump_is_not_replaced(exported: Path, dumped: Path) -> None:
    before = sorted(file.name for file in dumped.rglob("*"))
    done = run(exported, "--dump-ir", dumped)
    assert done.exit_code == 2
    assert done.stderr.endswith("is there already; name a new folder for the IR\n")
    assert sorted(file.name for file in dumped.rglob("*")) == before


def test_a_dump_is_of_one_target(exported: Path, tmp_path: Path) -> None:
    targets = ("--target", "llvm-cpu", "--target", "llvm-cpu:generic")
    done = run(exported, "--dump-ir", tmp_path / "dump", *targets)
    assert done.exit_code == 2
    assert "--dump-ir takes the IR of one target" in done.stderr
    assert not (tmp_path / "dump").exists()


def test_a_dump_that_fails_leaves_the_bundle_as_it_was(
    exported: Path, dumped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CompileError("no room left")

    monkeypatch.setattr(ir_dump, "pack_tree", fail)
    before = {file: file.stat().st_mtime_ns for file in exported.rglob("*") if file.is_file()}
    done = run(exported, "--dump-ir", tmp_path / "dump", "--passes", f"-{PASS}")
    assert done.exit_code == 2
    assert "no room left" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in exported.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.iterdir())
    Bundle.open(exported).target("llvm-cpu")
