"""Definitions of `llmir` ops that call the kernels in C."""

from __future__ import annotations

from importlib.resources import files
from string import Template

from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import GROUP, TILE16, TILE_ROWS, has_tile16, tile16_shapes
from llmir_iree.plugins.calls import LlmirCall, extent
from llmir_iree.plugins.kernels.build import choose_variant
from llmir_iree.plugins.kernels.executables import (
    Buffer,
    Kernel,
    executable,
    read_executable_target,
    read_processor,
)
from llmir_iree.plugins.kernels.objects import find_object
from llmir_iree.plugins.lowering import Target

# Bytes of an activation group, see activations.h.
_GROUP_BYTES = 40

# Of one workgroup. Few enough tiles that their weights fit the second cache, few enough for all cores to have some.
_MAX_TILES = 16
_MIN_WORKGROUPS = 8
_QUANTIZED_ROWS = 8

QUANTIZE = Kernel(
    "llmir_quantize_activations",
    "quantize_activations",
    (Buffer("f32"), Buffer("i8", writes=True)),
    ("rows", "columns", "workgroup_x", "rows_per_workgroup"),
)

_ELEMENTS = {"float16": "f16", "uint8": "i8", "int8": "i8"}


def multiply(weight_format: str) -> Kernel:
    """The kernel that multiplies activation groups with a format's tiles."""
    planes = tuple(Buffer(_ELEMENTS[plane.dtype.name]) for plane in FORMATS[weight_format].planes)
    return Kernel(
        f"llmir_quantized_matmul_{weight_format}",
        "quantized_matmul",
        (*planes, Buffer("i8"), Buffer("f32", writes=True)),
        ("rows", "columns", "depth", "workgroup_x", "tiles_per_workgroup"),
    )


def accepts_quantized_matmul(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, and the call's planes are tiles of a block format."""
    weight_format = str(call.constant("format"))
    x, *planes = call.operands
    columns, depth = int(call.constant("out_features")), x.shape[-1]
    if target.family != "llvm-cpu" or call.constant("layout") != TILE16.name or len(x.shape) != 3 or depth is None:
        return False
    if not has_tile16(weight_format) or not FORMATS[weight_format].is_quantized:
        return False
    if [plane.shape for plane in planes] != list(tile16_shapes(weight_format, columns, depth).values()):
        return False
    return choose_variant(*read_processor(read_executable_target(target.flags))) is not None


def quantized_matmul(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `quantized_matmul` on planes in layout tile16, and the executables that it dispatches.

    Args:
        call: one that `accepts_quantized_matmul` on the target.
        target: what the module is compiled for.

    Raises:
        CompileError: the kernels are not compiled, and cannot be.
    """
    weight_format = str(call.constant("format"))
    x, *planes = call.operands
    batch, seq, depth = x.shape
    assert batch is not None
    assert depth is not None
    columns = int(call.constant("out_features"))
    tiles = -(-columns // TILE_ROWS)
    # Even, because kernels take tiles in pairs.
    tiles_per_workgroup = min(_MAX_TILES, max(2, tiles // _MIN_WORKGROUPS // 2 * 2))
    names = [plane.name for plane in FORMATS[weight_format].planes]
    kernel = multiply(weight_format)
    text = (files(__package__) / "quantized_matmul.mlir").read_text(encoding="utf-8")
    definition = Template(text).substitute(
        name=call.symbol,
        x=x,
        y=call.results[0],
        plane_arguments=", ".join(f"%{name}: {plane}" for name, plane in zip(names, planes, strict=True)),
        plane_operands=", ".join(f"%{name}" for name in names),
        plane_types=", ".join(map(str, planes)),
        seq_dim="{%seq}" if seq is None else "",
        batch=extent(batch),
        columns=columns,
        depth=depth,
        groups=depth // GROUP,
        row_bytes=depth // GROUP * _GROUP_BYTES,
        rows_per_workgroup=_QUANTIZED_ROWS,
        tile_workgroups=-(-tiles // tiles_per_workgroup),
        tiles_per_workgroup=tiles_per_workgroup,
        quantize=QUANTIZE.entry,
        multiply=kernel.entry,
    )
    return {**_executables(target, QUANTIZE, kernel), call.symbol: definition}


def _executables(target: Target, *kernels: Kernel) -> dict[str, str]:
    executable_target = read_executable_target(target.flags)
    variant = choose_variant(*read_processor(executable_target))
    assert variant is not None
    return {
        kernel.name: executable(kernel, executable_target, find_object(variant, kernel.object)) for kernel in kernels
    }
