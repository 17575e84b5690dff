"""A module of the kernels that measure a machine."""

from __future__ import annotations

from importlib.resources import files
from string import Template

from llmir_iree.plugins.kernels.executables import (
    Buffer,
    Kernel,
    executable,
    find_variants,
    read_executable_target,
)
from llmir_iree.plugins.kernels.objects import find_object
from llmir_iree.plugins.lowering import Target

OPERAND_SHAPE = (4, 64)
"""Of the two matrices of bytes that `multiply_bytes` takes."""

MACS_PER_ROUND = 16 * 64
"""Products of bytes in each of its rounds, by each workgroup."""

_READ = Kernel(
    "llmir_read_memory",
    "machine_peaks",
    (Buffer("i8"), Buffer("i32", writes=True)),
    ("vectors", "workgroup_x", "vectors_per_workgroup"),
)
_MULTIPLY = Kernel(
    "llmir_multiply_bytes",
    "machine_peaks",
    (Buffer("i8"), Buffer("i8"), Buffer("i32", writes=True)),
    ("rounds", "workgroup_x"),
)


def peaks_module(target: Target) -> str | None:
    """MLIR of `read_memory(bytes [n], workgroups)` and `multiply_bytes(a, b, workgroups, rounds)`.

    Args:
        target: the CPU to measure.

    Returns:
        The module, or None where no kernels are compiled for the CPU.

    Raises:
        CompileError: the kernels are not compiled, and cannot be.
    """
    executable_target = read_executable_target(target.flags)
    variants = find_variants(executable_target)
    if not variants:
        return None
    executables = [
        executable(kernel, executable_target, {variant: find_object(variant, kernel.object) for variant in variants})
        for kernel in (_READ, _MULTIPLY)
    ]
    text = (files(__package__) / "machine_peaks.mlir").read_text(encoding="utf-8")
    functions = Template(text).substitute(read=_READ.entry, multiply=_MULTIPLY.entry)
    return "\n".join(["module @machine_peaks {", *executables, functions, "}"])
