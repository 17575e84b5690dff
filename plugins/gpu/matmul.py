"""Definitions of `quantized_matmul` by GPU kernels: sizes are decided here, templates compute."""

from __future__ import annotations

from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import GROUP, TILE16, TILE_ROWS, has_tile16, tile16_shapes
from llmir_iree.plugins.calls import LlmirCall
from llmir_iree.plugins.gpu.device import FAMILIES, read_device
from llmir_iree.plugins.gpu.templates import Value, kernel_name, render
from llmir_iree.plugins.lowering import Target

# Up to here unpacking a weight again for every few rows costs less than what many rows need: tiles in shared memory.
_MOST_FEW_ROWS = 16
_ROWS_EACH = 8

# A workgroup has as many threads as find two groups of columns to do, within these.
_FEWEST_THREADS = 64
_MOST_THREADS = 256
_LANES_PER_GROUP = 16


def accepts_quantized_matmul(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a GPU, and the weights are tiles of whole groups of 32 columns."""
    weight_format = str(call.constant("format"))
    x, *planes = call.operands
    if target.family not in FAMILIES or len(x.shape) != 3 or x.element != "f32" or x.shape[0] is None:
        return False
    depth = x.shape[-1]
    if depth is None or depth % GROUP or call.constant("layout") != TILE16.name or not has_tile16(weight_format):
        return False
    shapes = tile16_shapes(weight_format, int(call.constant("out_features")), depth)
    return [plane.shape for plane in planes] == list(shapes.values())


def quantized_matmul(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `quantized_matmul` on planes in layout tile16, and the executable that it dispatches.

    Raises:
        CompileError: iree-compile does not know the target's device.
    """
    weight_format, columns = str(call.constant("format")), int(call.constant("out_features"))
    x, *planes = call.operands
    batch, seq, depth = x.shape
    assert batch is not None
    assert depth is not None
    shapes = tile16_shapes(weight_format, columns, depth)
    sizes: dict[str, Value] = {
        "format": weight_format,
        "out_features": columns,
        "tiles": -(-columns // TILE_ROWS),
        "groups": depth // GROUP,
        "subgroup": read_device(target).subgroup,
        "planes": tuple(
            (plane.name, _view(plane.name, shapes[plane.name], weight_format))
            for plane in FORMATS[weight_format].planes
        ),
    }
    is_few = seq is not None and batch * seq <= _MOST_FEW_ROWS
    if seq is not None and is_few:
        rows = batch * seq
        sizes |= {"rows": rows, "rows_each": _even_share(rows, _ROWS_EACH), "threads": _threads(depth // GROUP)}
    template = "multiply_few" if is_few else "multiply_many"
    name = kernel_name(f"{template}_{weight_format}", **sizes)
    names = [plane.name for plane in FORMATS[weight_format].planes]
    definition = render(
        "quantized_matmul",
        symbol=call.symbol,
        name=name,
        is_few=is_few,
        batch=batch,
        x=x,
        y=call.results[0],
        plane_arguments=", ".join(f"%{name}: {plane}" for name, plane in zip(names, planes, strict=True)),
        plane_operands=", ".join(f"%{name}" for name in names),
        plane_types=", ".join(map(str, planes)),
        **sizes,
    )
    return {name: render(template, name=name, **sizes), call.symbol: definition}


def _view(plane: str, shape: tuple[int, ...], weight_format: str) -> str:
    """A plane as lanes read it: 4 rows of a tile at a time, as 32-bit words."""
    item_bytes = next(known.dtype.itemsize for known in FORMATS[weight_format].planes if known.name == plane)
    if len(shape) == 5:  # 4 bytes of a row stand side by side
        return "".join(f"{size}x" for size in shape[:3]) + "4xvector<4xi32>"
    word = "i32" if item_bytes == 1 else "vector<2xi32>"
    return "".join(f"{size}x" for size in shape[:-1]) + f"4x{word}"


def _even_share(number: int, most: int) -> int:
    """The size of the parts of a number, as few as do not exceed a size, and as even as can be."""
    return -(-number // -(-number // most))


def _threads(groups: int) -> int:
    threads = _FEWEST_THREADS
    while (
        threads < _MOST_THREADS and 2 * _LANES_PER_GROUP * threads // _LANES_PER_GROUP <= groups * _LANES_PER_GROUP // 2
    ):
        threads *= 2
    return threads
