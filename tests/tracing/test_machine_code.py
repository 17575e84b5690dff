"""Machine code of one dispatch, from files that iree-compile kept and from a binary alone."""

import re
import shutil
from pathlib import Path

import pytest

from llmir_iree.tracing import machine_code
from llmir_iree.tracing.capture import Capture, CaptureError, DispatchRun
from llmir_iree.tracing.machine_code import code_folder, find_assembly, find_llvm

needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump not found: install binutils")


@pytest.fixture(scope="module")
def keys(small_capture: Capture) -> tuple[str, str]:
    """Exports of the matmul and the softmax."""
    matmul, softmax = sorted({run.key for run in small_capture.read(DispatchRun)})
    return matmul, softmax


@pytest.fixture
def binary(small_capture: Capture, tmp_path: Path) -> Path:
    """A folder with the binary that was run, and nothing else."""
    [file] = (small_capture.ir / "binaries").glob("*.so")
    shutil.copy(file, tmp_path)
    return tmp_path


def test_llvm_ir_is_that_of_one_function(small_capture: Capture, keys: tuple[str, str]) -> None:
    texts = [find_llvm(small_capture.ir, (key,)) for key in keys]
    for key, text in zip(keys, texts, strict=True):
        assert text.startswith("define ")
        assert f"@{key}(" in text.splitlines()[0]
        assert text.endswith("\n}\n")
        assert text.count("\ndefine ") == 0
    assert "llvm.exp" not in texts[0]


def test_what_machine_code_is_made_of_comes_first(small_capture: Capture, keys: tuple[str, str]) -> None:
    """Of the three files that iree-compile writes."""
    [optimized] = (small_capture.ir / "binaries").glob("*.optimized.ll")
    assert find_llvm(small_capture.ir, (keys[0],)) in optimized.read_text()


def test_a_quoted_name_is_found(tmp_path: Path) -> None:
    name = "decode$async_dispatch_0"
    (tmp_path / "a.ll").write_text(
        f'define void @other() {{\n  ret void\n}}\ndefine i32 @"{name}"(ptr %0) {{\n  ret i32 0\n}}\n'
    )
    assert find_llvm(tmp_path, (name,)) == f'define i32 @"{name}"(ptr %0) {{\n  ret i32 0\n}}\n'
    (tmp_path / "a.s").write_text(f'"{name}":\n\tretq\n.Lfunc_end0:\n')
    assert find_assembly(tmp_path, (name,)) == f'"{name}":\n\tretq\n.Lfunc_end0:\n'


def test_any_of_its_names_will_do(small_capture: Capture, keys: tuple[str, str]) -> None:
    assert find_llvm(small_capture.ir, ("unknown", keys[1])) == find_llvm(small_capture.ir, (keys[1],))
    assert find_assembly(small_capture.ir, ("unknown", keys[1])) == find_assembly(small_capture.ir, (keys[1],))


def test_assembly_is_that_of_one_function(small_capture: Capture, keys: tuple[str, str]) -> None:
    for key in keys:
        text = find_assembly(small_capture.ir, (key,))
        assert text.startswith(f"{key}:\n")
        assert len(re.findall(r"^\.Lfunc_end\d+:", text, re.MULTILINE)) == 1


@needs_objdump
def test_a_binary_alone_is_disassembled(small_capture: Capture, binary: Path, keys: tuple[str, str]) -> None:
    """The same instructions as in the file that iree-compile kept, as far as both write them alike."""
    for key in keys:
        kept = re.findall(r"^\t([a-z]\w+)\s", find_assembly(small_capture.ir, (key,)), re.MULTILINE)
        disassembled = re.findall(r"^\s+[0-9a-f]+:\t(\w+)", find_assembly(binary, (key,)), re.MULTILINE)
        for name in ("vfmadd231ps", "fmla", "vmulps", "fmul", "vmaxps"):
            assert disassembled.count(name) == kept.count(name), name
        assert abs(len(disassembled) - len(kept)) < 0.2 * len(kept)


def test_what_is_not_there_is_told(small_capture: Capture, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"no \.ll file defines relu; .*--iree-hal-dump-executable-intermediates-to"):
        find_llvm(small_capture.ir, ("relu",))
    with pytest.raises(CaptureError, match=r"no \.s file and no binary holds relu; .*-binaries-to"):
        find_assembly(tmp_path, ("relu",))


@needs_objdump
def test_a_binary_that_does_not_hold_it_is_told(binary: Path) -> None:
    with pytest.raises(CaptureError, match="the debug information of no binary names relu"):
        find_assembly(binary, ("relu",))


@needs_objdump
def test_a_damaged_binary_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"not a binary")
    with pytest.raises(CaptureError, match=r"objdump: cannot read .*a\.so: .*not recognized"):
        find_assembly(tmp_path, ("relu",))


def test_a_missing_disassembler_is_told(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code.shutil, "which", lambda _: None)
    with pytest.raises(CaptureError, match="no program that disassembles it: install binutils' objdump"):
        find_assembly(binary, ("relu",))


def test_a_disassembler_that_does_not_end_is_told(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "objdump"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(machine_code.shutil, "which", lambda _: str(slow))
    monkeypatch.setattr(machine_code, "_TIMEOUT_S", 0.2)
    with pytest.raises(CaptureError, match=r"no end after 0\.2 s"):
        find_assembly(binary, ("relu",))


def test_where_machine_code_is_looked_for(small_capture: Capture, tmp_path: Path) -> None:
    assert code_folder(small_capture.folder) == small_capture.ir
    assert code_folder(tmp_path) == tmp_path
    assert code_folder(tmp_path / "log") == tmp_path
