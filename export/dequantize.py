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

from llmir_iree.params.formats import FORMATS

Planes = Sequence[Tensor]


def dequantize(weight_format: str, planes: Planes) -> Tensor:
    """The weights that planes stand for.

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
    group = torch.arange(8, dtype=torch.int32)[:, None]
    high = torch.bitwise_right_shift(qh.to(torch.int32)[..., None, :], group) & 1
    return (low + high * 16).float() * scale[..., None] - minimum[..., None]


def _q6_k(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    # A block is two halves of 128 weights; in a half, run r of 32 weights takes its low 4 bits from ql[32 (r % 2) ..],
    # nibble r / 2, and its high 2 bits from qh, bits 2 r.
    low = _nibbles(ql.unflatten(-1, (2, 64))).unflatten(-1, (2, 32)).flatten(-3, -2).to(torch.int32)
    run = torch.arange(4, dtype=torch.int32)[:, None]
    high = torch.bitwise_right_shift(qh.unflatten(-1, (2, 32)).to(torch.int32)[..., None, :], 2 * run) & 3
    quants: Tensor = (low + high * 16 - 32).float().flatten(-3).unflatten(-1, (16, 16))
    return quants * scales.float()[..., None] * d.float()[..., None, None]


def _nibbles(qs: Tensor) -> Tensor:
    """Low and high nibbles of bytes: uint8 [..., n] -> [..., 2, n]."""
    return torch.stack((qs & 15, qs >> 4), dim=-2)


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
