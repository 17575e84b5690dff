"""A module of the kernels that measure a machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmir_iree.plugins.kernels.executables import (
    Buffer,
    Kernel,
    executable,
    find_variants,
    read_executable_target,
)
from llmir_iree.plugins.kernels.objects import find_object
from llmir_iree.plugins.lowering import Target


@dataclass(frozen=True)
class Products:
    """What a kernel multiplies.

    Attributes:
        function: of the module.
        dtype: of its two operands.
        shape: of each of them, vectors by elements.
        times: how often a round multiplies every vector of the one with every vector of the other.
    """

    function: str
    dtype: npt.DTypeLike
    shape: tuple[int, int]
    times: int

    @property
    def macs_per_round(self) -> int:
        """Products in each round, by each workgroup."""
        vectors, elements = self.shape
        return self.times * vectors**2 * elements


Multiplied = Literal["bytes", "floats"]
"""What a processor has peaks of."""

PRODUCTS: dict[Multiplied, Products] = {
    "bytes": Products("multiply_bytes", np.int8, (4, 64), 2),
    "floats": Products("multiply_floats", np.float32, (4, 16), 1),
}

_READ = Kernel(
    "llmir_read_memory",
    "machine_peaks",
    (Buffer("i8"), Buffer("i32", writes=True)),
    ("vectors", "workgroup_x", "vectors_per_workgroup"),
)
_MULTIPLY_SIZES = ("rounds", "workgroup_x")
_MULTIPLY_BYTES = Kernel(
    "llmir_multiply_bytes",
    "machine_peaks",
    (Buffer("i8"), Buffer("i8"), Buffer("i32", writes=True)),
    _MULTIPLY_SIZES,
)
_MULTIPLY_FLOATS = Kernel(
    "llmir_multiply_floats",
    "machine_peaks",
    (Buffer("f32"), Buffer("f32"), Buffer("f32", writes=True)),
    _MULTIPLY_SIZES,
)


def peaks_module(target: Target) -> str | None:
    """MLIR of `read_memory(bytes [n], workgroups)`, and of `f(a, b, workgroups, rounds)` for all f in `PRODUCTS`.

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
        for kernel in (_READ, _MULTIPLY_BYTES, _MULTIPLY_FLOATS)
    ]
    text = (files(__package__) / "machine_peaks.mlir").read_text(encoding="utf-8")
    functions = Template(text).substitute(
        read=_READ.entry, multiply_bytes=_MULTIPLY_BYTES.entry, multiply_floats=_MULTIPLY_FLOATS.entry
    )
    return "\n".join(["module @machine_peaks {", *executables, functions, "}"])
