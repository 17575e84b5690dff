"""x is within scale / 2 of what is stored, and scale is the group's largest magnitude / 127."""

import numpy as np
import pytest

ROWS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 65)
RECORD = np.dtype([("codes", np.uint8, 32), ("scale", np.float32), ("sum", np.float32)])


def read(packed, rows, columns):
    """Codes [rows, groups, 32] without their excess, scales and sums [rows, groups], as activations.h lays them out."""
    groups = columns // 32
    records = packed.view(RECORD)
    ordered = np.concatenate(
        [records[first * groups : min(rows, first + 32) * groups].reshape(groups, -1).T for first in range(0, rows, 32)]
    )
    return ordered["codes"].astype(np.int32) - 128, ordered["scale"], ordered["sum"]


@pytest.mark.parametrize("columns", [32, 96, 2048])
@pytest.mark.parametrize("rows", ROWS)
def test_values_are_rounded_to_nearest(kernels, rows, columns):
    x = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    codes, scale, total = read(kernels.quantize(x), rows, columns)
    grouped = x.reshape(rows, -1, 32)
    np.testing.assert_allclose(scale, np.abs(grouped).max(-1) / 127, rtol=1e-6)
    assert np.abs(codes).max() == 127
    assert (np.abs(grouped - codes * scale[..., None]) <= scale[..., None] * (0.5 + 1e-4)).all()
    np.testing.assert_allclose(total, scale * codes.sum(-1), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_extreme_magnitudes(kernels, size):
    x = (np.random.default_rng(1).uniform(-1, 1, (3, 64)) * size).astype(np.float32)
    codes, scale, _ = read(kernels.quantize(x), 3, 64)
    error = np.abs(x.reshape(3, 2, 32).astype(np.float64) - codes * scale[..., None].astype(np.float64))
    assert (error <= np.maximum(scale[..., None].astype(np.float64) * 0.5001, 2.0**-120)).all()


def test_zeros_have_scale_zero(kernels):
    codes, scale, total = read(kernels.quantize(np.zeros((2, 64), np.float32)), 2, 64)
    assert not codes.any()
    assert not scale.any()
    assert not total.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_group_alone(kernels, value):
    x = np.ones((2, 64), np.float32)
    x[1, 40] = value
    _, scale, _ = read(kernels.quantize(x), 2, 64)
    assert np.isfinite(scale).tolist() == [[True, True], [True, False]]
