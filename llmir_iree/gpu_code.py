"""Reads what became of dispatches on a GPU: instructions, registers and spills, by the tools of each kind of code.

`iree-compile --iree-hal-dump-executable-{binaries,intermediates}-to=DIR` writes what is read here: PTX for cuda,
assembly with its metadata for rocm, SPIR-V for metal and vulkan, and the shaders' source for metal.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmir_iree.params.errors import CompileError, TargetError
from llmir_iree.targets import Target

PTXAS_PACKAGE = "pip install nvidia-cuda-nvcc"
SPIRV_VAL_PACKAGE = "Debian: apt-get install spirv-tools"
_TIMEOUT_S = 300

NO_NAME = re.compile(r"\W")
"""What a name may hold in the IR, but not in all kinds of code, which have an underscore there."""

# The least that each family of drivers takes; IREE's own choices for the two.
_ENVIRONMENTS = {"vulkan": "vulkan1.3", "metal": "vulkan1.1"}

# Sums, and the functions of a norm or a softmax.
_PTX_HALF_SUM = re.compile(
    r"^\s+(?:@!?%p\d+ +)?(?:(?:add|sub|fma|ex2|rsqrt|sqrt|tanh)\.(?:\w+\.)*b?f16(?:x2)?\s"
    r"|mma\.sync\.aligned\.\w+\.row\.col\.f16\.|wmma\.mma\.\S*\.f16\.f16\s)",
    re.MULTILINE,
)
_ROCM_HALF_SUM = re.compile(
    r"^\tv_(?:(?:pk_)?(?:add|sub|subrev|fma|fmac|fmaak|fmamk|exp|rsq|sqrt)_b?f16|dot2\w*_b?f16_b?f16|s?wmma_b?f16_)",
    re.MULTILINE,
)

_SPIRV_MAGIC = 0x07230203
_SPIRV_1_6 = 0x00010600
_OP_EXTENDED = 12
_OP_ENTRY_POINT = 15
_OP_TYPE_FLOAT = 22
_OP_TYPE_VECTOR = 23
# OpFAdd, OpFSub, OpFDiv, OpDot
_OP_SUMS = frozenset({129, 131, 136, 148})
# Of GLSL.std.450: pow, exp, log, exp2, log2, sqrt, inverse sqrt, fma.
_EXTENDED_SUMS = frozenset({26, 27, 28, 29, 30, 31, 32, 50})
_OP_COOPERATIVE_MATRIX_MULTIPLY = 4459


@dataclass(frozen=True)
class KernelCode:
    """The code of one dispatch.

    Attributes:
        name: the function that a device is asked to run.
        instructions: as the code counts them, labels and declarations left out; of SPIR-V every instruction counts.
        matrix_instructions: how many of those multiply matrices.
        registers: of a lane; None where the driver assigns them.
        spills: bytes of registers that are kept in memory, stores and loads together on cuda; None as with registers.
        shared_bytes: memory that a workgroup shares, as far as the code reserves it; None where it does not say.
        half_sums: instructions that add up in 16-bit floats, or take a root or a power of them. Matrix instructions of
            such numbers are among them only if they add up in them.
        is_checked: whether a tool took the code for right; not so where spirv-val is older than what the code uses.
    """

    name: str
    instructions: int
    matrix_instructions: int
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    half_sums: int = 0
    is_checked: bool = True


def read_code(folder: Path, target: Target) -> list[KernelCode]:
    """The dispatches of a module, by its dump, in order of names. PTX is also assembled, and SPIR-V validated.

    Args:
        folder: what iree-compile wrote with both of its options for dumps.
        target: what it compiled for.

    Raises:
        TargetError: a tool is missing; the message says which package brings it.
        CompileError: a tool refuses the code, or there is none.
    """
    readers = {"cuda": _read_cuda, "rocm": _read_rocm, "metal": _read_metal, "vulkan": _read_spirv}
    code = sorted(readers[target.family](folder, target), key=lambda kernel: kernel.name)
    if not code:
        raise CompileError(f"{folder}: no code for {target.name}; iree-compile wrote none")
    return code


def assemble(ptx: Path, architecture: str) -> dict[str, tuple[int, int, int]]:
    """Assemble PTX for an architecture such as "sm_90".

    Returns:
        Registers, spilled bytes and shared bytes of each kernel by its name.

    Raises:
        TargetError: there is no ptxas.
        CompileError: ptxas refuses the code.
    """
    return parse_ptxas(_run([find_ptxas(), "-v", f"-arch={architecture}", str(ptx), "-o", "/dev/null"]))


def find_ptxas() -> str:
    """The assembler of NVIDIA's packages on PyPI, or the one that the system has.

    Raises:
        TargetError: there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(file)
    return _find("ptxas", PTXAS_PACKAGE)


def parse_ptxas(text: str) -> dict[str, tuple[int, int, int]]:
    """Read what `ptxas -v` says: registers, spilled bytes and shared bytes by kernel."""
    found = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.partition("'")[0]
        stores, loads = map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", part)[:2])
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = int(registers[1]) if registers else 0, stores + loads, int(shared[1]) if shared else 0
    return found


def parse_ptx(text: str) -> list[KernelCode]:
    """The kernels of a PTX file, their registers unknown."""
    kernels = []
    for match in re.finditer(r"\.entry (\w+)\(.*?^\{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        name, body = match.groups()
        # An instruction starts a line, behind a predicate maybe; operands that go on, labels and directives do not.
        instructions = re.findall(r"^\s+(?:@!?%p\d+ +)?[a-z][a-z0-9_.:]*(?=\s|;)", body, re.MULTILINE)
        matrix_instructions = len(re.findall(r"\bw?mma\.(?:sync|mma)", body))
        half_sums = len(_PTX_HALF_SUM.findall(body))
        kernels.append(KernelCode(name, len(instructions), matrix_instructions, half_sums=half_sums))
    return kernels


def parse_rocm_assembly(text: str) -> list[KernelCode]:
    """The kernels of an assembly file for AMD GPUs, by its metadata."""
    metadata = text.partition(".amdgpu_metadata")[2].partition(".end_amdgpu_metadata")[0]
    kernels = []
    for part in re.split(r"^  - ", metadata, flags=re.MULTILINE)[1:]:
        values = dict(re.findall(r"^ *\.(\w+): +(\S+)$", part, re.MULTILINE))
        if "vgpr_count" not in values:
            continue
        name = values["name"].strip("'")  # So are names with a dollar sign in them.
        body = re.search(rf"^{re.escape(name)}:.*?\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
        code = body[1] if body is not None else ""
        kernels.append(
            KernelCode(
                name=name,
                instructions=len(re.findall(r"^\t[a-z]\w+", code, re.MULTILINE)),
                matrix_instructions=len(re.findall(r"^\tv_(?:s?mfma|s?wmma)_", code, re.MULTILINE)),
                registers=int(values["vgpr_count"]),
                # Of a vector register, every lane keeps 4 bytes; scalar ones are kept in vector registers first.
                spills=4 * int(values["vgpr_spill_count"]),
                shared_bytes=int(values["group_segment_fixed_size"]),
                half_sums=len(_ROCM_HALF_SUM.findall(code)),
            )
        )
    return kernels


def parse_spirv(data: bytes) -> list[KernelCode]:
    """The entry points of a SPIR-V module; with several, the instructions are those of all.

    Raises:
        CompileError: it is none.
    """
    words = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
    if len(words) < 5 or words[0] != _SPIRV_MAGIC:
        raise CompileError("not a SPIR-V module")
    names, count, matrix, half_sums = [], 0, 0, 0
    half_types: set[int] = set()
    position = 5
    while position < len(words):
        length, op = words[position] >> 16, words[position] & 0xFFFF
        if length == 0:
            raise CompileError("not a SPIR-V module: an instruction of no length")
        if op == _OP_ENTRY_POINT:
            names.append(data[4 * (position + 3) :].partition(b"\0")[0].decode())
        elif (op == _OP_TYPE_FLOAT and words[position + 2] == 16) or (
            op == _OP_TYPE_VECTOR and words[position + 2] in half_types
        ):
            half_types.add(words[position + 1])
        elif op in _OP_SUMS or (op == _OP_EXTENDED and words[position + 4] in _EXTENDED_SUMS):
            half_sums += words[position + 1] in half_types
        count += 1
        matrix += op == _OP_COOPERATIVE_MATRIX_MULTIPLY
        position += length
    return [KernelCode(name, count, matrix, half_sums=half_sums) for name in names]


def validate_spirv(file: Path, environment: str) -> bool:
    """Have spirv-val look at a module.

    Returns:
        Whether it could: not if it is older than a capability that the module declares.

    Raises:
        TargetError: there is no spirv-val.
        CompileError: it finds a fault.
    """
    try:
        _run([_find("spirv-val", SPIRV_VAL_PACKAGE), "--target-env", environment, str(file)])
    except CompileError as error:
        if "Invalid capability operand" in str(error):
            return False
        raise
    return True


def metal_head(name: str) -> str:
    """How the source of a dispatch's shader begins; Metal's language has no dollar sign in names."""
    return f"kernel void {re.sub(NO_NAME, '_', name)}("


def _read_cuda(folder: Path, target: Target) -> Iterator[KernelCode]:
    for file in sorted(folder.glob("*.ptx")):
        text = file.read_text(encoding="utf-8")
        [architecture] = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
        assembled = assemble(file, architecture)
        for kernel in parse_ptx(text):
            registers, spills, shared = assembled[kernel.name]
            yield replace(kernel, registers=registers, spills=spills, shared_bytes=shared)


def _read_rocm(folder: Path, target: Target) -> Iterator[KernelCode]:
    for file in sorted(folder.glob("*.rocmasm")):
        yield from parse_rocm_assembly(file.read_text(encoding="utf-8"))


def _read_metal(folder: Path, target: Target) -> Iterator[KernelCode]:
    for kernel in _read_spirv(folder, target):
        if not any(metal_head(kernel.name) in file.read_text() for file in folder.glob("*.metal")):
            raise CompileError(f"{folder}: no shader in Metal's language for {kernel.name}")
        yield kernel


def _read_spirv(folder: Path, target: Target) -> Iterator[KernelCode]:
    for file in sorted(folder.glob("*.spv")):
        data = file.read_bytes()
        with tempfile.NamedTemporaryFile(suffix=".spv") as copy:
            copy.write(_with_version(data, target))
            copy.flush()
            is_checked = validate_spirv(Path(copy.name), _ENVIRONMENTS[target.family])
        for kernel in parse_spirv(data):
            yield replace(kernel, is_checked=is_checked)


def _with_version(data: bytes, target: Target) -> bytes:
    """A module that says the version of SPIR-V that it is written in.

    iree-compile 3.13 writes in the version that a chip has, for Vulkan 1.6 unless flags say another one, but says the
    oldest that has the module's operations.
    """
    if target.family != "vulkan" or any("spirv:" in flag for flag in target.flags):
        return data
    return data[:4] + struct.pack("<I", _SPIRV_1_6) + data[8:]


def _find(tool: str, package: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise TargetError(f"{tool} is not installed; {package}")
    return path


def _run(command: list[str]) -> str:
    """Run a tool, and give what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise CompileError(f"{Path(command[0]).name}: no end after {_TIMEOUT_S} s: {' '.join(command)}") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CompileError(f"{Path(command[0]).name}: {lines[0] if lines else done.returncode}: {' '.join(command)}")
    return done.stdout + done.stderr
