"""Floats from packed blocks and back, one run of rows at a time; the arithmetic is that of the `gguf` package."""

from __future__ import annotations

from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from llmir_iree.params.errors import ParameterError
from llmir_iree.params.formats import FORMATS

PLAIN_ENCODINGS = frozenset({"f32", "f16", "bf16"})

# The package keeps its list of codecs private and has no public one; a test walks every type through it.
READABLE_ENCODINGS = PLAIN_ENCODINGS | {kind.name.lower() for kind in gguf.quants._type_traits}
"""Encodings that `dequantize` takes."""


def dequantize(array: npt.NDArray[Any], encoding: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Decode a tensor, or some rows of one, as `Checkpoint.read` returns it.

    Args:
        array: plain values of any shape, or uint8 [rows, bytes of a row].
        encoding: one of READABLE_ENCODINGS.
        shape: of the result.

    Raises:
        ParameterError: the encoding is unknown.
    """
    if encoding in PLAIN_ENCODINGS:
        return array.astype(np.float32, copy=False).reshape(shape)
    if encoding not in READABLE_ENCODINGS:
        raise ParameterError(f"{encoding} cannot be decoded; known are {', '.join(sorted(READABLE_ENCODINGS))}")
    kind = gguf.GGMLQuantizationType[encoding.upper()]
    # Hostile or damaged scales may overflow; that is the weights' fault and shows when they are encoded again.
    with np.errstate(all="ignore"):
        values: npt.NDArray[np.float32] = gguf.quants.dequantize(np.ascontiguousarray(array), kind)
    return values.reshape(shape)


def quantize(rows: npt.NDArray[np.float32], format_name: str) -> npt.NDArray[np.uint8]:
    """Encode float rows.

    Args:
        rows: float32 [rows, columns]; columns are a multiple of the format's block.
        format_name: a key of FORMATS that the `gguf` package can encode: f32, f16, bf16, q4_0, q4_1, q8_0.

    Returns:
        uint8 [rows, bytes of a row], as GGUF stores them.

    Raises:
        ParameterError: a value is not finite, or does not fit the format.
    """
    weight_format = FORMATS[format_name]
    if not np.isfinite(rows).all():
        raise ParameterError("holds values that are not finite")
    with np.errstate(all="ignore"):
        if weight_format.is_quantized:
            packed: npt.NDArray[np.uint8] = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[format_name.upper()])
            return packed
        plain = rows.astype(weight_format.planes[0].dtype)
    if not np.isfinite(plain.astype(np.float32)).all():
        raise ParameterError(f"holds values too large for {format_name}, up to {np.abs(rows).max():.6g}")
    return np.ascontiguousarray(plain).view(np.uint8)
