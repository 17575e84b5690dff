"""Compiles a model's module for a target, and reads what became of it: its dispatches, its code, and faults of both."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmir_iree.dispatch_list import DispatchList, find_half_arithmetic, list_dispatches
from llmir_iree.gpu_code import NO_NAME, KernelCode, assemble, metal_head, read_code
from llmir_iree.machine import cpu_count
from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.lowering import Preference
from llmir_iree.targets import Target

if TYPE_CHECKING:
    from llmir_iree.shape_models import ShapeModel

# PTX for the oldest of these runs on the others as well: their assemblers have to take it.
LATER_ARCHITECTURES = ("sm_90", "sm_120")


@dataclass(frozen=True)
class ModuleCheck:
    """A module compiled whole.

    Attributes:
        target: name of the target.
        phase: which of the model's modules it is.
        seconds: that iree-compile took.
        cpu_seconds: that it computed, on all cores together.
        nbytes: of the module.
        implementations: of every op, how many calls each implementation stands in for.
        functions: what each function dispatches.
        code: of every dispatch; none on CPUs.
        read_by: which tool took the code for right.
        faults: what is wrong with it.
    """

    target: str
    phase: str
    seconds: float
    cpu_seconds: float
    nbytes: int
    implementations: dict[str, dict[str, int]]
    functions: tuple[DispatchList, ...]
    code: tuple[KernelCode, ...]
    read_by: str
    faults: tuple[str, ...]

    @property
    def most_registers(self) -> int | None:
        """Of a lane of any dispatch; None where the driver assigns them."""
        return max((kernel.registers for kernel in self.code if kernel.registers is not None), default=None)

    @property
    def most_shared(self) -> int | None:
        """Bytes that a workgroup of any dispatch shares, as far as the code says."""
        return max((kernel.shared_bytes for kernel in self.code if kernel.shared_bytes is not None), default=None)

    @property
    def spilling(self) -> tuple[str, ...]:
        """Dispatches that keep registers in memory."""
        return tuple(kernel.name for kernel in self.code if kernel.spills)


def check_module(model: ShapeModel, phase: str, target: Target, preference: Preference = "best") -> ModuleCheck:
    """Lower and compile a module, once, and read all that there is to read.

    `cpu_seconds` count whatever else this process waits for meanwhile.

    Raises:
        CompileError: it does not compile, or a tool refuses the code.
        TargetError: a tool is missing; the message says which package brings it.
    """
    from llmir_iree.compile import compile_mlir
    from llmir_iree.plugins.pipeline import lower
    from llmir_iree.trace_build import known_kernels

    portable = model.phases[phase]
    lowered = lower(portable.text, target, preference, merged=model.merged)
    with tempfile.TemporaryDirectory(prefix="llmir-check-") as scratch:
        folder = Path(scratch)
        output, code_folder, phases = folder / "module.vmfb", folder / "code", folder / "phases"
        flags = (*target.flags, *dump_flags(target, code_folder), f"--dump-compilation-phases-to={phases}")
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        compile_mlir(lowered.text, output, flags)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        [stream] = phases.glob("*.stream.mlir")
        stream_ir = stream.read_text(encoding="utf-8")
        code, read_by = _read_code(code_folder, target)
        compiled = output.read_bytes()
    kernels = known_kernels()
    functions = tuple(list_dispatches(stream_ir, name, sizes, kernels) for name, sizes in portable.functions.items())
    return ModuleCheck(
        target=target.name,
        phase=phase,
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        nbytes=len(compiled),
        implementations=lowered.implementations,
        functions=functions,
        code=code,
        read_by=read_by,
        faults=(*_faults(functions, code, stream_ir), *_missing_shaders(target, code, compiled)),
    )


def check_modules(
    tasks: Sequence[tuple[ShapeModel, str, Target]], preference: Preference = "best", workers: int | None = None
) -> Iterator[ModuleCheck | CompileError]:
    """Check modules side by side, each in a process, in order; of one that does not compile there is the error.

    Args:
        tasks: model, phase and target of each.
        preference: which implementations may be chosen.
        workers: how many at the same time; as many as there are cores by default.

    Raises:
        TargetError: a tool is missing.
    """
    # A fork would share the threads of whatever this process has loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or cpu_count(), mp_context=context) as pool:
        futures = [pool.submit(check_module, *task, preference) for task in tasks]
        for future in futures:
            try:
                yield future.result()
            except CompileError as error:
                yield error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def dump_flags(target: Target, folder: Path) -> tuple[str, ...]:
    """Flags with which iree-compile leaves the code of dispatches in a folder; none for a CPU's."""
    if target.family == "llvm-cpu":
        return ()
    return f"--iree-hal-dump-executable-binaries-to={folder}", f"--iree-hal-dump-executable-intermediates-to={folder}"


def _read_code(folder: Path, target: Target) -> tuple[tuple[KernelCode, ...], str]:
    """The code of dispatches, and which tool found it right."""
    if target.family == "llvm-cpu":
        return (), ""
    code = tuple(read_code(folder, target))
    tools = {"cuda": "ptxas", "rocm": "metadata"}.get(target.family, "spirv-val")
    if unchecked := sum(not kernel.is_checked for kernel in code):
        tools += f", which is too old for {unchecked}"
    if target.chip == "sm_80":
        for later in LATER_ARCHITECTURES:
            for ptx in sorted(folder.glob("*.ptx")):
                assemble(ptx, later)
        tools += f", also for {' and '.join(LATER_ARCHITECTURES)}"
    return code, tools


def _faults(functions: tuple[DispatchList, ...], code: tuple[KernelCode, ...], stream_ir: str) -> Iterator[str]:
    for function in functions:
        if not function.total:
            yield f"{function.function}: dispatches nothing"
        yield from function.faults
    for op, count in find_half_arithmetic(stream_ir).items():
        yield f"{op} computes in 16-bit floats, {count} times"
    hot = {_as_in_code(name) for function in functions for name in function.hot}
    for kernel in code:
        if kernel.half_sums:
            yield f"{kernel.name}: adds up in 16-bit floats: {kernel.half_sums} instructions"
        if kernel.spills and _as_in_code(kernel.name) in hot:
            yield f"{kernel.name}: spills {kernel.spills} bytes"


def _missing_shaders(target: Target, code: tuple[KernelCode, ...], module: bytes) -> Iterator[str]:
    """On Metal, a device compiles the module's shaders itself: their source has to be in it."""
    for kernel in code if target.family == "metal" else ():
        if metal_head(kernel.name).encode() not in module:
            yield f"{kernel.name}: its shader is not in the module"


def _as_in_code(name: str) -> str:
    """A name as all kinds of code can write it."""
    return NO_NAME.sub("_", name)
