"""What `--emit-spec` writes, compiled by iree-compile with the printed flags and nothing else."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmir_iree.bundle import Bundle
from llmir_iree.cli import compile as compile_cli
from llmir_iree.compile import compile_mlir, compiler, read_portable
from llmir_iree.emit_spec import emit_spec
from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target


def dispatches(stream: Path) -> Counter[str]:
    """What a module at the stream level dispatches, and how often."""
    return Counter(re.findall(r"stream\.cmd\.dispatch (@\S+?)[\[(]", stream.read_text()))


@pytest.mark.parametrize("name", ["llvm-cpu", "vulkan:llvmpipe"])
def test_iree_compile_makes_the_same_dispatches(exported: Bundle, name: str, tmp_path: Path) -> None:
    target, folder = resolve_target(name), tmp_path / "spec"
    result = CliRunner().invoke(compile_cli.main, [str(exported.folder), "--target", name, "--emit-spec", str(folder)])
    assert result.exit_code == 0, result.output
    phases = exported.manifest.phases_for(prefill_chunks=target.prefill_chunks)
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [Path(command[1]).name for command in commands] == [f"{phase}.mlir" for phase in phases]
    for phase, command in zip(phases, commands, strict=True):
        stream = [compiler(), *command[1:], "--compile-to=stream"]
        subprocess.run(stream, check=True, timeout=300, capture_output=True)
        ours = tmp_path / f"{phase}.mlir"
        text = lower(read_portable(exported, phase), target, merged=exported.manifest.parameters.merged).text
        compile_mlir(text, ours, (*target.flags, "--compile-to=stream"))
        expected = dispatches(ours)
        assert expected
        assert dispatches(folder / f"{phase}.vmfb") == expected


def test_a_folder_of_another_place_compiles_to_a_module(exported: Bundle, tmp_path: Path) -> None:
    """Objects are found in the folder, not where they were."""
    commands = emit_spec(exported, resolve_target("llvm-cpu"), tmp_path / "spec")
    assert list((tmp_path / "spec" / "objects").rglob("*.o"))
    text = (tmp_path / "spec" / "decode_spec.mlir").read_text()
    assert set(re.findall(r'object<\{path = "([^/"]*)', text)) == {"objects"}
    shutil.move(tmp_path / "spec", tmp_path / "moved")
    command = [part.replace(str(tmp_path / "spec"), str(tmp_path / "moved")) for part in commands[-1]]
    subprocess.run([compiler(), *command[1:]], check=True, timeout=300, capture_output=True)
    assert (tmp_path / "moved" / "decode.vmfb").stat().st_size > 10_000


def test_a_folder_that_is_there_is_left_alone(exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="is there already; name a new folder for the spec"):
        emit_spec(exported, resolve_target("llvm-cpu"), tmp_path)
    arguments = [str(exported.folder), "--target", "cuda", "--target", "metal", "--emit-spec", str(tmp_path / "spec")]
    result = CliRunner().invoke(compile_cli.main, arguments)
    assert result.exit_code == 2
    assert "--emit-spec writes for one target" in result.stderr
