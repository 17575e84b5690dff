"""The MLIR around a kernel: an executable whose one dispatch calls a C function of a compiled object."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from string import Template

from iree.compiler.tools.binaries import find_tool

from llmir_iree.params.errors import CompileError

VARIANT = "cpu"

_TARGET = re.compile(r"#hal\.executable\.target<[^{}]*\{[^{}]*\}>")
_WORKGROUP = {"workgroup_x": 0, "workgroup_y": 1, "workgroup_z": 2}


@dataclass(frozen=True)
class Buffer:
    """A buffer that a kernel gets as a pointer and an offset."""

    element: str
    writes: bool = False


@dataclass(frozen=True)
class Kernel:
    """The signature of a C function, as the comment above it lists it.

    `sizes` are its arguments after the buffers, in order; a `workgroup_x`, `_y` or `_z` among them comes from the
    dispatch, the others are passed to the dispatch as i32. Those that are `floats` are passed as their bits.
    """

    name: str
    object: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[str, ...]
    floats: frozenset[str] = frozenset()

    @property
    def constants(self) -> tuple[str, ...]:
        """What a dispatch of this kernel is passed in front of its tensors."""
        return tuple(size for size in self.sizes if size not in _WORKGROUP)

    @property
    def entry(self) -> str:
        """The symbol that a dispatch names."""
        return f"@{self.name}_executable::@{VARIANT}::@{self.name}_dispatch"


def executable(kernel: Kernel, target: str, compiled: Path) -> str:
    """MLIR of the executable of a kernel.

    Args:
        kernel: what to call.
        target: the `#hal.executable.target` that the module is compiled for.
        compiled: the object to link, for a processor that the target has. It is named by its whole path, so that the
            compiler needs no flag to find it; its data cannot stand in the module, IREE 3.13 links an empty file then.
    """
    bindings = (f"#hal.pipeline.binding<storage_buffer{'' if b.writes else ', ReadOnly'}>" for b in kernel.buffers)
    layout = f"#hal.pipeline.layout<constants = {len(kernel.constants)}, bindings = [{', '.join(bindings)}]>"
    lines = [
        *(line for ordinal, size in enumerate(kernel.constants) for line in _constant(layout, ordinal, size, kernel)),
        *(
            f"%{size} = hal.interface.workgroup.id[{_WORKGROUP[size]}] : index"
            for size in kernel.sizes
            if size in _WORKGROUP
        ),
        *(line for ordinal, buffer in enumerate(kernel.buffers) for line in _binding(layout, ordinal, buffer)),
    ]
    pointers = [f"%pointer{ordinal}, %offset{ordinal}" for ordinal in range(len(kernel.buffers))]
    types = [f"memref<{buffer.element}>, index" for buffer in kernel.buffers]
    types += ["f32" if size in kernel.floats else "index" for size in kernel.sizes]
    text = (files(__package__) / "executable.mlir").read_text(encoding="utf-8")
    return Template(text).substitute(
        kernel=kernel.name,
        variant=VARIANT,
        object=compiled.as_posix(),
        target=target,
        layout=layout,
        operands="\n        ".join(lines),
        arguments=", ".join(pointers + [f"%{size}" for size in kernel.sizes]),
        types=", ".join(types),
    )


@lru_cache
def read_executable_target(flags: tuple[str, ...]) -> str:
    """The `#hal.executable.target` that iree-compile derives from flags: the CPU's features in full.

    Raises:
        CompileError: iree-compile refuses the flags.
    """
    command = [find_tool("iree-compile"), "-", "--compile-to=flow", *flags]
    done = subprocess.run(command, input="module {}", capture_output=True, text=True, check=False)
    found = _TARGET.search(done.stdout)
    if found is None:
        raise CompileError(f"iree-compile names no executable target for {' '.join(flags)}: {done.stderr.strip()}")
    return found[0]


def read_processor(target: str) -> tuple[str, frozenset[str]]:
    """Architecture and features of the processor that a `#hal.executable.target` describes."""
    architecture = re.search(r'target_triple = "([^"-]+)', target)
    listed = re.search(r'cpu_features = "([^"]*)"', target)
    # A feature may be named more than once, the last time counts.
    signs = {feature[1:]: feature[:1] for feature in (listed[1].split(",") if listed else [])}
    features = frozenset(feature for feature, sign in signs.items() if sign == "+")
    return architecture[1] if architecture else "", features


def _constant(layout: str, ordinal: int, size: str, kernel: Kernel) -> tuple[str, ...]:
    is_float = size in kernel.floats
    return (
        f"%{size}_i32 = hal.interface.constant.load layout({layout}) ordinal({ordinal}) : i32",
        f"%{size} = arith.bitcast %{size}_i32 : i32 to f32"
        if is_float
        else f"%{size} = arith.index_castui %{size}_i32 : i32 to index",
    )


def _binding(layout: str, ordinal: int, buffer: Buffer) -> tuple[str, ...]:
    memref = f"memref<?x{buffer.element}>"
    return (
        f"%buffer{ordinal} = hal.interface.binding.subspan layout({layout}) binding({ordinal}) alignment(64) "
        f"offset(%zero) : {memref}{{%unknown_extent}}",
        f"%pointer{ordinal}, %offset{ordinal}, %extent{ordinal}, %stride{ordinal} = "
        f"iree_codegen.extract_strided_metadata %buffer{ordinal} : {memref} -> "
        f"memref<{buffer.element}>, index, index, index",
    )
