"""What the planes of a weight format mean, written in torch.

This is the reference that every kernel is held to. It is also traced: a quantised embedding is a lookup of planes, and
then this. So it keeps to operations that both torch and IREE know: no views of bytes as other types, and no `>>` by a
tensor.

Source of the formulas: dequantize_row_* in ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmir_iree.params.errors import ParameterError
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import LAYOUTS, PLANES, TILE_ROWS, Layout, lane_dimension

Planes = Sequence[Tensor]


def matrix(weight_format: str, layout: str, planes: Planes, rows: int) -> Tensor:
    """The matrix that stored planes stand for.

    Args:
        weight_format: key of `llmir_iree.params.FORMATS`.
        layout: key of `llmir_iree.params.LAYOUTS`.
        planes: the format's planes in its order, shaped as the layout says.
        rows: of the matrix; tiles may hold more.

    Returns:
        float32 [rows, columns].

    Raises:
        ParameterError: the layout is unknown.
    """
    if _known(layout) == PLANES:
        return dequantize(weight_format, planes)
    lanes_second = [plane.movedim(lane_dimension(plane.dim()), 1).flatten(0, 1) for plane in planes]
    return _TILE_ROWS[weight_format](*lanes_second)[:rows]


def look_up(weight_format: str, layout: str, planes: Planes, ids: Tensor) -> Tensor:
    """Rows of a matrix in stored planes: ids [...] -> float32 [..., columns]; of `matrix`, only those rows are read.

    Raises:
        ParameterError: the layout is unknown.
    """
    if _known(layout) == PLANES:
        return dequantize(weight_format, [plane[ids] for plane in planes])
    tile, lane = ids // TILE_ROWS, ids % TILE_ROWS
    return _TILE_ROWS[weight_format](*(_lane(plane, tile, lane) for plane in planes))


def _lane(plane: Tensor, tile: Tensor, lane: Tensor) -> Tensor:
    """One lane of one tile for each index: [T, ..., 16] or [T, ..., 16, 4] -> [*indices, ...] or [*indices, ..., 4].

    As one index into the flat plane, which reads no other lanes; torch-mlir lowers no two indices of unknown size.
    """
    dimension = lane_dimension(plane.dim())
    inside = torch.arange(plane[0].numel()).reshape(plane.shape[1:]).select(dimension - 1, 0)
    first = tile * plane[0].numel() + lane * plane[0].stride(dimension - 1)
    index = first.reshape(*first.shape, *[1] * inside.dim()) + inside
    return plane.flatten()[index]


def _known(layout: str) -> Layout:
    if layout not in LAYOUTS:
        raise ParameterError(f"unknown layout {layout!r} of weights; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def dequantize(weight_format: str, planes: Planes) -> Tensor:
    """The weights that planes in layout `planes` stand for.

    Args:
        weight_format: key of `llmir_iree.params.FORMATS`.
        planes: the format's planes in its order, each [..., blocks] or [..., blocks, length]; leading dimensions are
            free (rows of a matrix, or rows that a lookup picked).

    Returns:
        float32 [..., blocks * block_size].
    """
    first = FORMATS[weight_format].planes[0]
    leading = planes[0].dim() - (1 if first.length == 1 else 2)
    return _DEQUANTIZE[weight_format](*planes).flatten(start_dim=leading)


def _plain(w: Tensor) -> Tensor:
    return w.float()


def _q4_0(d: Tensor, qs: Tensor) -> Tensor:
    return (_nibbles(qs).float() - 8.0) * d.float()[..., None, None]


def _q4_1(d: Tensor, m: Tensor, qs: Tensor) -> Tensor:
    return _nibbles(qs).float() * d.float()[..., None, None] + m.float()[..., None, None]


def _q8_0(d: Tensor, qs: Tensor) -> Tensor:
    return qs.float() * d.float()[..., None]


def _q4_k(d: Tensor, dmin: Tensor, scales: Tensor, qs: Tensor) -> Tensor:
    scale, minimum = _k_scales(d, dmin, scales)
    quants = _nibbles(qs.unflatten(-1, (4, 32))).flatten(-3, -2)
    return quants.float() * scale[..., None] - minimum[..., None]


def _q5_k(d: Tensor, dmin: Tensor, scales: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    scale, minimum = _k_scales(d, dmin, scales)
    low = _nibbles(qs.unflatten(-1, (4, 32))).flatten(-3, -2).to(torch.int32)
    return (low + _high_bits(qh, 1) * 16).float() * scale[..., None] - minimum[..., None]


def _q6_k(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    # A block is two halves of 128 weights; in a half, run r of 32 weights takes its low 4 bits from ql[32 (r % 2) ..],
    # nibble r / 2, and its high 2 bits from qh, bits 2 r.
    low = _nibbles(ql.unflatten(-1, (2, 64))).unflatten(-1, (2, 32)).flatten(-3, -2).to(torch.int32)
    high = _high_bits(qh.unflatten(-1, (2, 32)), 2)
    quants: Tensor = (low + high * 16 - 32).float().flatten(-3).unflatten(-1, (16, 16))
    return quants * scales.float()[..., None] * d.float()[..., None, None]


def _nibbles(qs: Tensor) -> Tensor:
    """Low and high nibbles of bytes: uint8 [..., n] -> [..., 2, n]."""
    return torch.stack((qs & 15, qs >> 4), dim=-2)


def _high_bits(qh: Tensor, bits: int) -> Tensor:
    """The codes that bytes share, the lowest bits first: uint8 [..., n] -> int32 [..., 8 / bits, n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)[:, None]
    high: Tensor = torch.bitwise_right_shift(qh.to(torch.int32)[..., None, :], shifts) & (2**bits - 1)
    return high


def _k_scales(d: Tensor, dmin: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of a K-quant block, from their 12 bytes: two float32 [..., 8]."""
    first, second, third = scales.to(torch.int32).unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    return scale.float() * d.float()[..., None], minimum.float() * dmin.float()[..., None]


_DEQUANTIZE: dict[str, Callable[..., Tensor]] = {
    "f32": _plain,
    "f16": _plain,
    "bf16": _plain,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


# Rows of a matrix in layout tile16, its lanes taken out: what is left of a plane are columns in the order of the steps,
# groups of 32 after the leading dimension. See `llmir_iree.params.layouts`.


def _tile_q4_0(d: Tensor, qs: Tensor) -> Tensor:
    return ((_tile_nibbles(qs).float() - 8.0) * d.float()[..., None]).flatten(-2)


def _tile_q4_1(d: Tensor, m: Tensor, qs: Tensor) -> Tensor:
    return (_tile_nibbles(qs).float() * d.float()[..., None] + m.float()[..., None]).flatten(-2)


def _tile_q8_0(d: Tensor, qs: Tensor) -> Tensor:
    return (qs.flatten(-2).float() * d.float()[..., None]).flatten(-2)


def _tile_q4_k(d: Tensor, dmin: Tensor, scales: Tensor, qs: Tensor) -> Tensor:
    return _tile_k(d, dmin, scales, _tile_nibbles(qs))


def _tile_q5_k(d: Tensor, dmin: Tensor, scales: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    high = _high_bits(qh, 1).flatten(-3)
    return _tile_k(d, dmin, scales, _tile_nibbles(qs).to(torch.int32) + high * 16)


def _tile_k(d: Tensor, dmin: Tensor, scales: Tensor, quants: Tensor) -> Tensor:
    """Rows from quants [..., groups, 32], and from their blocks' scales and minima, 8 groups to a block."""
    scale, minimum = (factor.flatten(-2)[..., None] for factor in _k_scales(d, dmin, scales))
    return (quants.float() * scale - minimum).flatten(-2)


def _tile_q6_k(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    high = _high_bits(qh, 2).flatten(-3)
    quants: Tensor = (_tile_nibbles(ql).to(torch.int32) + high * 16 - 32).float()
    # Dimensions: block, 16 runs of 16 columns with a scale each.
    scaled = quants.flatten(-2).unflatten(-1, (-1, 16, 16)) * scales.float().unflatten(-1, (-1, 16))[..., None]
    weights: Tensor = (scaled * d.float()[..., None, None]).flatten(-3)
    return weights


def _tile_nibbles(qs: Tensor) -> Tensor:
    """uint8 [..., groups, 4, 4] -> [..., groups, 32]."""
    return _nibbles(qs).flatten(-3)


_TILE_ROWS: dict[str, Callable[..., Tensor]] = {
    "f16": _plain,
    "bf16": _plain,
    "q4_0": _tile_q4_0,
    "q4_1": _tile_q4_1,
    "q8_0": _tile_q8_0,
    "q4_k": _tile_q4_k,
    "q5_k": _tile_q5_k,
    "q6_k": _tile_q6_k,
}
