"""The weight formats that a bundle may hold, and the fields of a block of each.

A block format is what GGUF calls a quantisation type: a run of `block_size` weights along a row, stored as a C struct.
The archive holds a matrix of such blocks as *planes*, one array for every field of the struct, so that the compiler
sees typed tensors instead of bytes; `layouts` says in which order. No bit changes: `split_planes` only regroups.

Source of the struct definitions: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Plane:
    """One field of a block: `length` elements of `dtype` for every block of a row."""

    name: str
    dtype: np.dtype
    length: int = 1

    def shape(self, rows: int, blocks: int) -> tuple[int, ...]:
        """Shape of this plane for a matrix: [rows, blocks], or [rows, blocks, length] for longer fields."""
        return (rows, blocks) if self.length == 1 else (rows, blocks, self.length)


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of one matrix are stored: blocks of `block_size` weights along each row, split into planes."""

    name: str
    block_size: int
    planes: tuple[Plane, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether a block shares scales, as against plain floating-point elements."""
        return self.block_size > 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all planes together."""
        return sum(plane.dtype.itemsize * plane.length for plane in self.planes)

    @property
    def block_dtype(self) -> np.dtype:
        """The block as the struct that GGUF stores."""
        return np.dtype([(plane.name, plane.dtype, (plane.length,)) for plane in self.planes])

    def accepts(self, columns: int) -> bool:
        """Whether rows of this many weights are a whole number of blocks."""
        return columns > 0 and columns % self.block_size == 0

    def plane_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the planes of a [rows, columns] matrix."""
        return {plane.name: plane.shape(rows, columns // self.block_size) for plane in self.planes}

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that a [rows, columns] matrix takes."""
        return rows * (columns // self.block_size) * self.block_bytes


_F16 = np.dtype(np.float16)
_U8 = np.dtype(np.uint8)
_I8 = np.dtype(np.int8)


def _plain(name: str, dtype: npt.DTypeLike) -> WeightFormat:
    return WeightFormat(name, 1, (Plane("w", np.dtype(dtype)),))


FORMATS: dict[str, WeightFormat] = {
    weight_format.name: weight_format
    for weight_format in (
        _plain("f32", np.float32),
        _plain("f16", np.float16),
        _plain("bf16", ml_dtypes.bfloat16),
        WeightFormat("q4_0", 32, (Plane("d", _F16), Plane("qs", _U8, 16))),
        WeightFormat("q4_1", 32, (Plane("d", _F16), Plane("m", _F16), Plane("qs", _U8, 16))),
        WeightFormat("q8_0", 32, (Plane("d", _F16), Plane("qs", _I8, 32))),
        WeightFormat(
            "q4_k", 256, (Plane("d", _F16), Plane("dmin", _F16), Plane("scales", _U8, 12), Plane("qs", _U8, 128))
        ),
        WeightFormat(
            "q5_k",
            256,
            (
                Plane("d", _F16),
                Plane("dmin", _F16),
                Plane("scales", _U8, 12),
                Plane("qh", _U8, 32),
                Plane("qs", _U8, 128),
            ),
        ),
        WeightFormat(
            "q6_k", 256, (Plane("ql", _U8, 128), Plane("qh", _U8, 64), Plane("scales", _I8, 16), Plane("d", _F16))
        ),
    )
}


def split_planes(weight_format: WeightFormat, blocks: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.generic]]:
    """Regroup rows of packed blocks into planes.

    Args:
        weight_format: the format of the blocks.
        blocks: uint8 [rows, bytes of a row], as GGUF stores them.

    Returns:
        One array for every plane, shaped as `Plane.shape` says. Single-plane formats are views, not copies.
    """
    rows = blocks.shape[0]
    structs = np.ascontiguousarray(blocks).view(weight_format.block_dtype)
    return {
        plane.name: structs[plane.name].reshape(plane.shape(rows, structs.shape[1])) for plane in weight_format.planes
    }
