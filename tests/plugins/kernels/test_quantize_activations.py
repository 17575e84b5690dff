"""What codes stand for against what was quantised: x itself, or a norm of it."""

import numpy as np
import pytest
import torch

from tests.plugins.kernels.conftest import dequantize_activations, read_records, rounding_bound

ROWS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 65)


def random_rows(rows, columns, seed=0):
    """Groups around zero, above and below it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) + np.repeat(rng.uniform(-3, 3, (rows, columns // 32)), 32, axis=-1)
    return x.astype(np.float32)


def check(packed, x):
    """That codes stand for x, and their fields for each other."""
    records = read_records(packed, *x.shape)
    first = records[..., 0]
    error = np.abs(dequantize_activations(packed, *x.shape) - x)
    assert (error <= rounding_bound(x, first["has_rest"] != 0)).all()
    codes = records["codes"].astype(np.int32)
    np.testing.assert_array_equal(records["start"], -8 * codes.sum(-1))
    np.testing.assert_array_equal(records["low_start"], -8 * codes[..., :16].sum(-1))
    np.testing.assert_array_equal(first["has_rest"] != 0, is_outlier(first["scale"]))


def is_outlier(scale):
    """Groups whose scale is above the geometric mean over those of their row that are not zero, by the root of two.

    Both are compared as the kernels do it, by the bits of floats.
    """
    bits = np.ascontiguousarray(scale).view(np.int32).astype(np.int64)
    mean = bits.sum(-1) // np.maximum((bits != 0).sum(-1), 1)
    return (bits > mean[:, None] + 2**22) & (bits != 0)


@pytest.mark.parametrize("columns", [32, 96, 2048])
@pytest.mark.parametrize("rows", ROWS)
def test_values_are_rounded_to_nearest(kernels, rows, columns):
    x = random_rows(rows, columns, rows)
    check(kernels.quantize(x), x)


def test_all_codes_are_used(kernels):
    x = random_rows(3, 256)
    codes = read_records(kernels.quantize(x), 3, 256)["codes"][..., 0, :]
    assert (np.abs(codes).max(-1) == 127).all()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_extreme_magnitudes(kernels, size):
    x = (np.random.default_rng(1).uniform(-1, 1, (3, 64)) * size).astype(np.float32)
    check(kernels.quantize(x), x)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-38])
def test_zero_is_exact(kernels, value):
    """And what is as good as zero: denormal floats, and what 127 divided by it would overflow."""
    packed = kernels.quantize(np.full((2, 64), value, np.float32))
    assert not dequantize_activations(packed, 2, 64).any()
    assert not read_records(packed, 2, 64)["codes"].any()


@pytest.mark.parametrize("value", [1.0, -3e38, 0.1])
def test_a_constant_group_is_exact_but_for_float32(kernels, value):
    x = np.full((2, 64), value, np.float32)
    packed = kernels.quantize(x)
    np.testing.assert_allclose(dequantize_activations(packed, 2, 64), x, rtol=2.0**-23)
    assert not read_records(packed, 2, 64)["has_rest"].any()


def test_zero_groups_do_not_make_the_others_outliers(kernels):
    x = random_rows(4, 2048)
    x[:, 320:] = 0
    has_rest = read_records(kernels.quantize(x), 4, 2048)["has_rest"][..., 0]
    assert not has_rest[:, 10:].any()
    assert has_rest[:, :10].mean() < 0.5
    check(kernels.quantize(x), x)


def test_outliers_do_not_cost_the_others_their_digits(kernels):
    """In their group, where a second record holds what the rounding left; the other groups need none."""
    x = random_rows(40, 96)
    x[:, 40] = 1000.0
    packed = kernels.quantize(x)
    has_rest = read_records(packed, 40, 96)["has_rest"][..., 0]
    assert has_rest[:, 1].all()
    assert not has_rest[:, [0, 2]].any()
    error = np.abs(dequantize_activations(packed, 40, 96) - x)
    assert error[:, 32:64].max() < 1000 / 254**2
    check(packed, x)


def test_neighbouring_floats_stay_in_range(kernels):
    x = np.ones((1, 32), np.float32)
    x[0, 7] = np.nextafter(np.float32(1), np.float32(2))
    check(kernels.quantize(x), x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [32, 40, 63])
def test_what_is_not_finite_spoils_its_group_alone(kernels, value, column):
    x = random_rows(2, 64)
    x[1, column] = value
    scale = read_records(kernels.quantize(x), 2, 64)["scale"][..., 0]
    assert np.isfinite(scale).tolist() == [[True, True], [True, False]]
    assert np.isnan(scale[1, 1])


def rms_norm(x, weight, epsilon):
    x, weight = torch.from_numpy(x), torch.from_numpy(weight)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon).numpy()


@pytest.mark.parametrize("columns", [32, 96, 2048])
@pytest.mark.parametrize("rows", ROWS)
def test_norms(kernels, rows, columns):
    x, residual = random_rows(rows, columns, 1), random_rows(rows, columns, 2)
    weight = random_rows(1, columns, 3)[0]
    total, packed = kernels.add_norm_quantize(x, residual, weight, 1e-5)
    np.testing.assert_array_equal(total, x + residual)
    check_norm(packed, rms_norm(x + residual, weight, 1e-5))
    check_norm(kernels.norm_quantize(x, weight, 1e-5), rms_norm(x, weight, 1e-5))


def check_norm(packed, expected):
    error = np.abs(dequantize_activations(packed, *expected.shape) - expected)
    has_rest = read_records(packed, *expected.shape)["has_rest"][..., 0] != 0
    assert (error <= rounding_bound(expected, has_rest) + 1e-6 * np.abs(expected)).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e15])
def test_norms_of_extreme_magnitudes(kernels, size):
    """Where epsilon is all there is, and where it is nothing."""
    x = (np.random.default_rng(1).uniform(-1, 1, (3, 64)) * size).astype(np.float32)
    weight = random_rows(1, 64)[0]
    check_norm(kernels.norm_quantize(x, weight, 1e-6), rms_norm(x, weight, 1e-6))


def test_a_norm_spreads_what_is_not_finite_over_its_row(kernels):
    x, weight = random_rows(2, 64), np.ones(64, np.float32)
    x[1, 3] = np.nan
    scale = read_records(kernels.norm_quantize(x, weight, 1e-5), 2, 64)["scale"][..., 0]
    assert np.isfinite(scale).tolist() == [[True, True], [False, False]]
