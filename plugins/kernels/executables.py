"""The MLIR around a kernel: an executable whose one dispatch calls a C function of a compiled object."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.compiler_target import describe_target
from llmir_iree.plugins.kernels.build import Variant, choose_variants

VARIANT = "cpu"

_TARGET = re.compile(r"#hal\.executable\.target<[^{}]*\{[^{}]*\}>")

# What numbers a workgroup: its place in an array of such elements.
_WORKGROUP = {"workgroup_x": (0, "i32"), "workgroup_y": (1, "i32"), "workgroup_z": (4, "i16")}

# Where the runtime says that a processor has a feature, after iree/schemas/cpu_feature_bits.inl.
_FEATURE_BITS = {
    "x86_64": {"avx": 10, "fma": 11, "f16c": 14, "avx2": 15}
    | {"avx512f": 20, "avx512cd": 21, "avx512vl": 22, "avx512dq": 23, "avx512bw": 24, "avx512vnni": 28},
    "aarch64": {"dotprod": 12, "i8mm": 13},
}

# Features that the runtime does not know; every processor with AVX2 has them.
_IMPLIED = frozenset({"bmi", "bmi2", "lzcnt", "movbe"})


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


def executable(kernel: Kernel, target: str, objects: Mapping[Variant, Path]) -> str:
    """MLIR of the executable of a kernel.

    Args:
        kernel: what to call.
        target: the `#hal.executable.target` that the module is compiled for.
        objects: what to link, the best instruction set first. The dispatch calls the first one that the processor has
            it runs on, and the last one if it has none. They are named by their whole paths, so that the compiler
            needs no flag to find them; their data cannot stand in the module, IREE 3.13 links an empty file then.
    """
    bindings = (f"#hal.pipeline.binding<storage_buffer{'' if b.writes else ', ReadOnly'}>" for b in kernel.buffers)
    types = ["!llvm.ptr, i64"] * len(kernel.buffers)
    types += ["f32" if size in kernel.floats else "i64" for size in kernel.sizes]
    signature = f"({', '.join(types)})"
    names = [variant.symbol(kernel.name) for variant in objects]
    declarations = [f"llvm.func @{name}{signature} attributes {{hal.import.static}}" for name in names]
    text = (files(__package__) / "executable.mlir").read_text(encoding="utf-8")
    return Template(text).substitute(
        kernel=kernel.name,
        variant=VARIANT,
        target=target,
        objects=", ".join(f'#hal.executable.object<{{path = "{path.as_posix()}"}}>' for path in objects.values()),
        layout=f"#hal.pipeline.layout<constants = {len(kernel.constants)}, bindings = [{', '.join(bindings)}]>",
        declarations="\n      ".join(declarations),
        operands="\n        ".join(_operands(kernel)),
        calls="\n        ".join(_calls(kernel, signature, list(objects))),
    )


def read_executable_target(flags: tuple[str, ...]) -> str:
    """The `#hal.executable.target` of a CPU that iree-compile derives from flags: its features in full.

    Raises:
        CompileError: iree-compile refuses the flags, or they do not name a CPU.
    """
    found = _TARGET.search(describe_target(flags))
    if found is None:
        raise CompileError(f"iree-compile names no CPU for {' '.join(flags)}")
    return found[0]


def find_variants(target: str) -> list[Variant]:
    """The instruction sets to link for the processor that a `#hal.executable.target` describes, the best first."""
    values = dict(re.findall(r'(target_triple|cpu|cpu_features) = "([^"]*)"', target))
    # A feature may be named more than once, the last time counts.
    signs = {feature[1:]: feature[:1] for feature in values.get("cpu_features", "").split(",")}
    features = {feature for feature, sign in signs.items() if sign == "+"}
    architecture = values.get("target_triple", "").partition("-")[0]
    return choose_variants(architecture, features, is_generic=values.get("cpu", "") in ("", "generic"))


def _operands(kernel: Kernel) -> Iterator[str]:
    """Loads of what a kernel is passed."""
    for ordinal in range(len(kernel.buffers)):
        yield from _load(f"pointer{ordinal}", "bindings", ordinal, "!llvm.ptr")
    for ordinal, size in enumerate(kernel.constants):
        if size in kernel.floats:
            yield from _load(size, "constants", ordinal, "f32")
        else:
            yield from _load(f"{size}_i32", "constants", ordinal, "i32")
            yield f"%{size} = llvm.zext %{size}_i32 : i32 to i64"
    for size in kernel.sizes:
        if size in _WORKGROUP:
            # The numbers of a workgroup are two of 32 bits and one of 16.
            ordinal, element = _WORKGROUP[size]
            yield from _load(f"{size}_{element}", "workgroup", ordinal, element)
            yield f"%{size} = llvm.zext %{size}_{element} : {element} to i64"


def _load(name: str, array: str, ordinal: int, element: str) -> tuple[str, str]:
    return (
        f"%{name}_at = llvm.getelementptr %{array}[{ordinal}] : (!llvm.ptr) -> !llvm.ptr, {element}",
        f"%{name} = llvm.load %{name}_at : !llvm.ptr -> {element}",
    )


def _calls(kernel: Kernel, signature: str, variants: Sequence[Variant]) -> Iterator[str]:
    """Calls of a kernel in the first instruction set whose features are there; the last one needs no test."""
    pointers = (f"%pointer{ordinal}, %zero" for ordinal in range(len(kernel.buffers)))
    arguments = ", ".join([*pointers, *(f"%{size}" for size in kernel.sizes)])
    for index, variant in enumerate(variants):
        if index < len(variants) - 1:
            yield f"%needed{index} = llvm.mlir.constant({_feature_bits(variant)} : i64) : i64"
            yield f"%common{index} = llvm.and %features, %needed{index} : i64"
            yield f'%has{index} = llvm.icmp "eq" %common{index}, %needed{index} : i64'
            yield f"llvm.cond_br %has{index}, ^variant{index}, ^next{index}"
            yield f"^variant{index}:"
        yield f"llvm.call @{variant.symbol(kernel.name)}({arguments}) : {signature} -> ()"
        yield "llvm.br ^done"
        if index < len(variants) - 1:
            yield f"^next{index}:"


def _feature_bits(variant: Variant) -> int:
    """What the runtime's description of a processor has set if the variant runs there."""
    bits = _FEATURE_BITS[variant.architecture]
    return sum(1 << bits[feature] for feature in variant.features - _IMPLIED)
