"""How the planes of a weight matrix are ordered in an archive: as the format has them, or as kernels stream them.

`planes` is GGUF's own order, row after row. `tile16` puts 16 rows side by side, so that the lanes of a register hold
the same column of 16 rows, and orders the columns as a kernel meets them. No bit is added or lost but the rows of zeros
that fill the last tile: `unpack` undoes `pack`.

With T = ceil(rows / 16) tiles, K columns, and 4 consecutive columns (a *step*) to each 32-bit lane:
    plain      w       [T, K, 16]
    q4_0       d       [T, K / 32, 16]
               qs      [T, K / 32, 4, 16, 4]: byte (i, row, k) holds column 8 i + k below, 8 i + 4 + k above
    q4_1       d, m, qs as in q4_0
    q8_0       d       [T, K / 32, 16]
               qs      [T, K / 32, 8, 16, 4]: byte (i, row, k) is column 4 i + k
    q4_k       d, dmin [T, K / 256, 16]
               scales  [T, K / 256, 12, 16]: the 12 bytes of a block's packed scales and minima, byte after byte
               qs      [T, K / 32, 4, 16, 4]: as in q4_0
    q5_k       d, dmin, scales as in q4_k
               qh      [T, K / 32, 1, 16, 4]: the fifth bit; byte (row, k) holds columns 4 s + k at bit s
               qs      [T, K / 32, 4, 16, 4]: the low 4 bits, as in q4_0
    q6_k       ql      [T, K / 32, 4, 16, 4]: the low 4 bits, as qs of q4_0
               qh      [T, K / 32, 2, 16, 4]: the high 2 bits; byte (i, row, k) holds columns 16 i + 4 s + k at bit 2 s
               scales  [T, K / 16, 16]
               d       [T, K / 256, 16]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmir_iree.params.formats import FORMATS

TILE_ROWS = 16
GROUP = 32
ALIGNMENT = 64
"""Bytes to which every plane is aligned in the file; less would make IREE copy instead of map."""

Array = npt.NDArray[Any]
Planes = dict[str, Array]


@dataclass(frozen=True)
class Layout:
    """A named order of planes, and the version that a manifest states beside the name."""

    name: str
    version: int


PLANES = Layout("planes", 1)
TILE16 = Layout("tile16", 1)
LAYOUTS = {layout.name: layout for layout in (PLANES, TILE16)}


@dataclass(frozen=True)
class _Repacking:
    pack: Callable[[Mapping[str, Array]], Planes]
    unpack: Callable[[Mapping[str, Array]], Planes]


def has_tile16(weight_format: str) -> bool:
    """Whether a format can be stored as tile16."""
    return weight_format in _TILE16


def layout_of(weight_format: str) -> Layout:
    """The layout in which archives hold a format: tiles where they exist, so that kernels can stream the matrix."""
    return TILE16 if has_tile16(weight_format) else PLANES


def stored_shapes(weight_format: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the planes of a [rows, columns] matrix in the archive, in the order of the format."""
    if layout_of(weight_format) == TILE16:
        return tile16_shapes(weight_format, rows, columns)
    return FORMATS[weight_format].plane_shapes(rows, columns)


def lane_dimension(rank: int) -> int:
    """Which dimension of a tile16 plane is the row in its tile: behind it, planes of bytes have 4 columns of a step."""
    return 3 if rank == 5 else rank - 1


def pack_tile16(weight_format: str, planes: Mapping[str, Array]) -> Planes:
    """Regroup the planes of a matrix into tiles.

    Args:
        weight_format: key of `FORMATS`, one that `has_tile16`.
        planes: the format's planes by name, shaped as `WeightFormat.plane_shapes` says.

    Returns:
        The same planes in layout tile16, contiguous.
    """
    return {name: np.ascontiguousarray(plane) for name, plane in _repacking(weight_format).pack(planes).items()}


def unpack_tile16(weight_format: str, planes: Mapping[str, Array], rows: int) -> Planes:
    """The planes of a matrix of `rows` rows, from their tiles."""
    return {
        name: np.ascontiguousarray(plane[:rows]) for name, plane in _repacking(weight_format).unpack(planes).items()
    }


def tile16_shapes(weight_format: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the planes of a [rows, columns] matrix in layout tile16, in the order of the format."""
    shapes = FORMATS[weight_format].plane_shapes(1, columns)
    one_row = {plane.name: np.zeros(shapes[plane.name], plane.dtype) for plane in FORMATS[weight_format].planes}
    tiles = -(-rows // TILE_ROWS)
    return {name: (tiles, *plane.shape[1:]) for name, plane in pack_tile16(weight_format, one_row).items()}


def _repacking(weight_format: str) -> _Repacking:
    if weight_format not in _TILE16:
        raise ValueError(f"no layout tile16 for format {weight_format!r}; it exists for {', '.join(_TILE16)}")
    return _TILE16[weight_format]


# Rows to tiles and back.


def _tile(plane: Array) -> Array:
    """[rows, ...] -> [T, ..., 16], with rows of zeros at the end."""
    tiles = -(-plane.shape[0] // TILE_ROWS)
    padded = np.zeros((tiles * TILE_ROWS, *plane.shape[1:]), plane.dtype)
    padded[: plane.shape[0]] = plane
    return np.moveaxis(padded.reshape(tiles, TILE_ROWS, *plane.shape[1:]), 1, -1)


def _untile(tiles: Array) -> Array:
    """[T, ..., 16] -> [rows, ...]."""
    rows = np.moveaxis(tiles, -1, 1)
    return rows.reshape(-1, *rows.shape[2:])


def _tile_bytes(columns: Array) -> Array:
    """One byte for each column, [rows, K] -> [T, K / 32, 8, 16, 4]."""
    return np.swapaxes(_tile(columns.reshape(len(columns), -1, 8, 4)), -1, -2)


def _untile_bytes(tiles: Array) -> Array:
    rows = _untile(np.swapaxes(tiles, -1, -2))
    return rows.reshape(len(rows), -1)


def _pack_bits(steps: Array, bits: int) -> Array:
    """[T, groups, 8, 16, 4] -> [T, groups, bits, 16, 4]: successive steps share a byte, the first lowest."""
    per_byte = 8 // bits
    split = steps.reshape(*steps.shape[:2], 8 // per_byte, per_byte, TILE_ROWS, 4)
    shifts = (bits * np.arange(per_byte, dtype=np.uint8))[:, None, None]
    packed: Array = np.bitwise_or.reduce(split << shifts, axis=3)
    return packed


def _unpack_bits(packed: Array, bits: int) -> Array:
    per_byte = 8 // bits
    shifts = (bits * np.arange(per_byte, dtype=np.uint8))[:, None, None]
    split = (packed[:, :, :, None] >> shifts) & np.uint8(2**bits - 1)
    return split.reshape(*packed.shape[:2], 8, TILE_ROWS, 4)


# Codes of one byte each, [rows, K], from the fields of GGUF's blocks and back.


def _codes_from_nibbles(fields: Array, run: int) -> Array:
    """Fields [rows, blocks, n]: of every `run` bytes, the low nibbles come before the high ones."""
    runs = fields.reshape(len(fields), -1, run)
    return np.stack((runs & 15, runs >> 4), axis=2).reshape(len(fields), -1)


def _nibbles_from_codes(codes: Array, run: int, block_bytes: int) -> Array:
    runs = codes.reshape(len(codes), -1, 2, run)
    packed: Array = runs[:, :, 0] | (runs[:, :, 1] << 4)
    return packed.reshape(len(codes), -1, block_bytes)


def _codes_from_high_bits(qh: Array, bits: int) -> Array:
    """Fields [rows, blocks, 32 n]: of every 32 bytes, the lowest bits come first."""
    runs = qh.reshape(len(qh), -1, 1, 32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes: Array = (runs >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(qh), -1)


def _high_bits_from_codes(codes: Array, bits: int) -> Array:
    """Fields [rows, blocks of 256 codes, 32 bits]."""
    runs = codes.reshape(len(codes), -1, 8 // bits, 32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: Array = np.bitwise_or.reduce(runs << shifts, axis=2)
    return packed.reshape(len(codes), -1, 32 * bits)


# Formats.


def _pack_plain(planes: Mapping[str, Array]) -> Planes:
    return {"w": _tile(planes["w"])}


def _unpack_plain(planes: Mapping[str, Array]) -> Planes:
    return {"w": _untile(planes["w"])}


def _pack_q4(planes: Mapping[str, Array]) -> Planes:
    scales = {name: _tile(plane) for name, plane in planes.items() if name != "qs"}
    return {**scales, "qs": _pack_bits(_tile_bytes(_codes_from_nibbles(planes["qs"], 16)), 4)}


def _unpack_q4(planes: Mapping[str, Array]) -> Planes:
    scales = {name: _untile(plane) for name, plane in planes.items() if name != "qs"}
    return {**scales, "qs": _nibbles_from_codes(_untile_bytes(_unpack_bits(planes["qs"], 4)), 16, 16)}


def _pack_q8(planes: Mapping[str, Array]) -> Planes:
    return {"d": _tile(planes["d"]), "qs": _tile_bytes(planes["qs"].reshape(len(planes["qs"]), -1))}


def _unpack_q8(planes: Mapping[str, Array]) -> Planes:
    codes = _untile_bytes(planes["qs"])
    return {"d": _untile(planes["d"]), "qs": codes.reshape(len(codes), -1, GROUP)}


def _pack_q4_k(planes: Mapping[str, Array]) -> Planes:
    return {
        **{name: _tile(planes[name]) for name in ("d", "dmin", "scales")},
        "qs": _pack_bits(_tile_bytes(_codes_from_nibbles(planes["qs"], 32)), 4),
    }


def _unpack_q4_k(planes: Mapping[str, Array]) -> Planes:
    return {
        **{name: _untile(planes[name]) for name in ("d", "dmin", "scales")},
        "qs": _nibbles_from_codes(_untile_bytes(_unpack_bits(planes["qs"], 4)), 32, 128),
    }


def _pack_q5_k(planes: Mapping[str, Array]) -> Planes:
    low = _pack_q4_k(planes)
    qh = _pack_bits(_tile_bytes(_codes_from_high_bits(planes["qh"], 1)), 1)
    return {name: qh if name == "qh" else low[name] for name in planes}


def _unpack_q5_k(planes: Mapping[str, Array]) -> Planes:
    low = _unpack_q4_k(planes)
    qh = _high_bits_from_codes(_untile_bytes(_unpack_bits(planes["qh"], 1)), 1)
    return {name: qh if name == "qh" else low[name] for name in planes}


def _pack_q6(planes: Mapping[str, Array]) -> Planes:
    return {
        "ql": _pack_bits(_tile_bytes(_codes_from_nibbles(planes["ql"], 64)), 4),
        "qh": _pack_bits(_tile_bytes(_codes_from_high_bits(planes["qh"], 2)), 2),
        "scales": _tile(planes["scales"].reshape(len(planes["scales"]), -1)),
        "d": _tile(planes["d"]),
    }


def _unpack_q6(planes: Mapping[str, Array]) -> Planes:
    scales = _untile(planes["scales"])
    return {
        "ql": _nibbles_from_codes(_untile_bytes(_unpack_bits(planes["ql"], 4)), 64, 128),
        "qh": _high_bits_from_codes(_untile_bytes(_unpack_bits(planes["qh"], 2)), 2),
        "scales": scales.reshape(len(scales), -1, 16),
        "d": _untile(planes["d"]),
    }


_TILE16: dict[str, _Repacking] = {
    "f16": _Repacking(_pack_plain, _unpack_plain),
    "bf16": _Repacking(_pack_plain, _unpack_plain),
    "q4_0": _Repacking(_pack_q4, _unpack_q4),
    "q4_1": _Repacking(_pack_q4, _unpack_q4),
    "q8_0": _Repacking(_pack_q8, _unpack_q8),
    "q4_k": _Repacking(_pack_q4_k, _unpack_q4_k),
    "q5_k": _Repacking(_pack_q5_k, _unpack_q5_k),
    "q6_k": _Repacking(_pack_q6, _unpack_q6),
}
