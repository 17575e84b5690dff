from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest

from llmir_iree.params import FORMATS, READABLE_ENCODINGS, ParameterError
from llmir_iree.params.quantize import dequantize, quantize

PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def test_every_type_of_gguf_that_holds_weights_is_readable():
    no_weights = {"i8", "i16", "i32", "i64", "f64"}
    no_codec = {"q8_1", "q8_k", "q1_0"}  # activations' formats, and one that the package cannot decode yet
    assert {kind.name.lower() for kind in gguf.GGMLQuantizationType} - no_weights - no_codec == READABLE_ENCODINGS


@pytest.mark.parametrize("encoding", PLAIN)
def test_plain_values_survive(encoding):
    values = np.random.default_rng(0).standard_normal((3, 7)).astype(PLAIN[encoding])
    packed = quantize(values.astype(np.float32), encoding)
    assert packed.dtype == np.uint8
    assert packed.shape == (3, FORMATS[encoding].nbytes(1, 7))
    assert (packed.view(PLAIN[encoding]) == values).all()
    assert (dequantize(values, encoding, (3, 7)) == values.astype(np.float32)).all()


@pytest.mark.parametrize(("name", "bits"), [("q4_0", 4), ("q4_1", 4), ("q8_0", 8)])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_blocks_are_within_half_a_step(name, bits, rows):
    values = np.random.default_rng(rows).standard_normal((rows, 96)).astype(np.float32)
    packed = quantize(values, name)
    assert packed.shape == (rows, FORMATS[name].nbytes(1, 96))
    span = np.ptp(np.concatenate([values, -values]).reshape(-1, 32), axis=1).max()
    error = np.abs(dequantize(packed, name, values.shape) - values).max()
    assert error <= span / 2**bits * 1.1  # a whole step of q4_0 at its clipped end, and the rounding of its f16 scale


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ParameterError, match="not finite"):
        quantize(np.array([[1.0, np.nan]], np.float32), "f16")


def test_values_too_large_for_f16_are_refused():
    with pytest.raises(ParameterError, match="too large for f16, up to 100000"):
        quantize(np.array([[1.0, -1e5]], np.float32), "f16")


def test_unknown_encoding_lists_the_known():
    with pytest.raises(ParameterError, match="i64 cannot be decoded; known are bf16"):
        dequantize(np.zeros(3, np.int64), "i64", (3,))
