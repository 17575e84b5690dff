"""Finds what LLVM made of one dispatch: its part of the `.ll` and `.s` files, or of the binary."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from llmir_iree.tracing.capture import MANIFEST_NAME, CaptureError

_TIMEOUT_S = 60
_HOW_TO_KEEP = "iree-compile keeps them with --iree-hal-dump-executable-{kind}-to=DIR"
# Of the three that iree-compile writes, that which the machine code is made of comes first.
_LLVM_FILES = ("*.optimized.ll", "*.linked.ll", "*.codegen.ll", "*.ll")
_ENTRY = re.compile(r"^ <1>.*?(?=^ <[0-9a-f]+>|\Z)", re.MULTILINE | re.DOTALL)
_LOW = re.compile(r"DW_AT_low_pc\s*: (0x[0-9a-f]+)")
_HIGH = re.compile(r"DW_AT_high_pc\s*: (0x[0-9a-f]+)")


def find_llvm(folder: Path, functions: tuple[str, ...]) -> str:
    """LLVM IR of a function, by any of its names, as it was before machine code was made of it.

    Raises:
        CaptureError: no file of the folder defines it.
    """
    for pattern in _LLVM_FILES:
        for file in sorted(folder.rglob(pattern)):
            text = file.read_text(encoding="utf-8", errors="replace")
            for name in functions:
                quoted = re.escape(name)
                if found := re.search(
                    rf'^define [^\n]*@(?:"{quoted}"|{quoted})\(.*?^}}', text, re.MULTILINE | re.DOTALL
                ):
                    return found[0] + "\n"
    hint = _HOW_TO_KEEP.format(kind="intermediates")
    raise CaptureError(f"{folder}: no .ll file defines {functions[0]}; {hint}")


def find_assembly(folder: Path, functions: tuple[str, ...]) -> str:
    """Assembly of a function, by any of its names: from a `.s` file, or from a binary, disassembled.

    Raises:
        CaptureError: no file holds it, or a tool is missing; the message says what.
    """
    for file in sorted(folder.rglob("*.s")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in functions:
            quoted = re.escape(name)
            label = rf'^(?:"{quoted}"|{quoted}):'
            if found := re.search(rf"{label}.*?^\.Lfunc_end\d+:", text, re.MULTILINE | re.DOTALL):
                return found[0] + "\n"
    binaries = sorted(folder.rglob("*.so"))
    if not binaries:
        hint = f"{_HOW_TO_KEEP.format(kind='intermediates')}, and binaries with --iree-hal-dump-executable-binaries-to"
        raise CaptureError(f"{folder}: no .s file and no binary holds {functions[0]}; {hint}")
    objdump = shutil.which("objdump")
    if objdump is None:
        raise CaptureError(
            f"{folder}: a binary is here, but no program that disassembles it: install binutils' objdump"
        )
    for binary in binaries:
        for low, high in _find_ranges(objdump, binary, functions):
            return _run(
                [objdump, "-d", "--no-show-raw-insn", f"--start-address={low:#x}", f"--stop-address={high:#x}", binary]
            )
    raise CaptureError(f"{folder}: the debug information of no binary names {functions[0]}")


def _find_ranges(objdump: str, binary: Path, functions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Addresses of functions: the binary has no symbols of them, its debug information does."""
    for entry in _ENTRY.findall(_run([objdump, "--dwarf=info", binary])):
        is_named = not {line.rpartition(": ")[2] for line in entry.splitlines()}.isdisjoint(functions)
        low, high = _LOW.search(entry), _HIGH.search(entry)
        if is_named and low and high:
            yield int(low[1], 16), int(low[1], 16) + int(high[1], 16)


def _run(command: list[str | Path]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise CaptureError(f"{command[0]}: no end after {_TIMEOUT_S} s on {command[-1]}") from None
    if done.returncode != 0:
        detail = done.stderr.strip().splitlines()
        raise CaptureError(f"{command[0]}: cannot read {command[-1]}: {detail[-1] if detail else done.returncode}")
    return done.stdout


def code_folder(source: Path) -> Path:
    """Where machine code is looked for: in a capture beside its tree, otherwise in and beside what was given."""
    if (source / MANIFEST_NAME).is_file():
        return source / "ir"
    return source if source.is_dir() else source.parent
