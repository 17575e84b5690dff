"""Definitions that put 4-bit weights of other programs into layout tile16, bit for bit, for the kernels that read it.

They are no ops: passes call them, when a module is loaded or in each call. Matrices are given as tensors of any shape
whose elements lie row after row.
"""

from __future__ import annotations

from importlib.resources import files
from string import Template
from typing import Literal

from llmir_iree.params.layouts import GROUP, TILE_ROWS
from llmir_iree.plugins.calls import TensorType

NibbleOrder = Literal["pairs", "halves"]
"""Which columns a byte holds, below and above: 2 j and 2 j + 1 of its row, or j and j + 16 of its group of 32, as GGUF
has them."""

_INTEGERS = {"ui8": "arith.uitofp", "si8": "arith.sitofp", "si16": "arith.sitofp", "si32": "arith.sitofp"}
_FLOATS = {"f16": "arith.extf", "bf16": "arith.extf", "f32": "arith.bitcast"}
ZERO_ELEMENTS = {**_INTEGERS, **_FLOATS}
"""Element types, as torch writes them, of zero points that can be converted to float32, and the operation that does."""


def tile_nibbles(symbol: str, packed: TensorType, rows: int, columns: int, order: NibbleOrder) -> str:
    """A function from uint8 [rows, columns / 2] to the plane `qs` of q4_0 or q4_1."""
    groups, tiles = columns // GROUP, -(-rows // TILE_ROWS)
    a, c = (4, 2) if order == "pairs" else (2, 4)
    dims = "t, g, a, l, c, h" if order == "pairs" else "t, g, h, a, l, c"
    sizes = {"t": tiles, "g": groups, "a": a, "l": TILE_ROWS, "c": c, "h": 2}
    joined = TensorType(tuple(sizes[dim] for dim in dims.split(", ")), "i8")
    return _fill(
        "tile_nibbles",
        **_padded(TensorType((rows, columns // 2), "i8"), "0 : i8"),
        name=symbol,
        packed=packed,
        tiles=tiles,
        groups=groups,
        a=a,
        c=c,
        order=dims,
        h=dims.split(", ").index("h"),
        half=TensorType((tiles, TILE_ROWS, groups, a, c), "i8"),
        joined=joined,
        collapse="[[0], [1], [2], [3], [4, 5]]" if order == "pairs" else "[[0], [1], [2, 3], [4], [5]]",
        tiled=TensorType((tiles, groups, 4, TILE_ROWS, 4), "i8"),
    )


def tile_scales(symbol: str, scales: TensorType, rows: int, count: int, columns: int) -> str:
    """A function from float16 [rows, count] to the plane `d` or `m` of q4_0 or q4_1."""
    tiles = -(-rows // TILE_ROWS)
    return _fill(
        "tile_scales",
        **_padded(TensorType((rows, count), "f16"), "0.0 : f16"),
        name=symbol,
        scales=scales,
        tiles=tiles,
        count=count,
        repeats=columns // GROUP // count,
        tiled=TensorType((tiles, columns // GROUP, TILE_ROWS), "f16"),
    )


def minima_of_zeros(symbol: str, scales: TensorType, zeros: TensorType, element: str, rows: int, count: int) -> str:
    """A function from float16 scales and zero points of an element type, both [rows, count], to minima."""
    return _fill(
        "minima_of_zeros",
        name=symbol,
        scales=scales,
        zeros=zeros,
        matrix=TensorType((rows, count), "f16"),
        zero_matrix=TensorType((rows, count), zeros.element),
        zero=zeros.element,
        convert=ZERO_ELEMENTS[element],
    )


def _padded(matrix: TensorType, zero: str) -> dict[str, object]:
    """What fills the last tile of a matrix with rows of zeros, if that is not whole."""
    rows, columns = matrix.shape
    missing = -(rows or 0) % TILE_ROWS
    padded = TensorType(((rows or 0) + missing, columns), matrix.element)
    pad = (
        f"%zero = arith.constant {zero}\n  %whole = tensor.pad %rows low[0, 0] high[{missing}, 0] {{\n"
        f"  ^bb0(%row: index, %column: index):\n    tensor.yield %zero : {matrix.element}\n  }} : {matrix} to {padded}"
    )
    return {
        "matrix": matrix,
        "padded": padded,
        "pad": pad if missing else "",
        "whole": "%whole" if missing else "%rows",
    }


def _fill(template: str, **values: object) -> str:
    text = (files(__package__) / f"{template}.mlir").read_text(encoding="utf-8")
    return Template(text).substitute(values)
