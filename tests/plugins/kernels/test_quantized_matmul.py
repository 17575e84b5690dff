"""Products of bytes against the exact product of the dequantised weights, in float64.

The bound: activations are off by what `rounding_bound` allows, each in the direction that hurts most, and sums of
float32 by their rounding.
"""

import numpy as np
import pytest
import torch

from llmir_iree.export.dequantize import dequantize
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import pack_tile16
from tests.plugins.kernels.conftest import dequantize_activations, read_records, rounding_bound

ROWS = (1, 2, 3, 7, 8, 9, 31, 33)
BLOCKED = ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")
ROUNDING = 1e-5


def random_weights(weight_format, columns, depth, scale=0.02, seed=0):
    """Planes with random codes, and the float64 weights that they stand for."""
    rng = np.random.default_rng(seed)
    shapes = FORMATS[weight_format].plane_shapes(columns, depth)
    planes = {}
    for plane in FORMATS[weight_format].planes:
        shape = shapes[plane.name]
        if plane.dtype == np.int8 or plane.dtype == np.uint8:
            planes[plane.name] = rng.integers(0, 256, shape, np.uint8).view(plane.dtype)
        else:
            planes[plane.name] = (rng.standard_normal(shape) * scale).astype(plane.dtype)
    tensors = [
        torch.from_numpy(plane.astype(np.float32) if plane.dtype.kind == "V" else plane.copy())
        for plane in planes.values()
    ]
    return planes, dequantize(weight_format, tensors).double().numpy()


def bound(x, weights):
    """Largest error of each result, [rows, columns]."""
    return (rounding_bound(x) + ROUNDING * np.abs(x.astype(np.float64))) @ np.abs(weights).T


def check(kernels, weight_format, x, columns, **options):
    planes, weights = random_weights(weight_format, columns, x.shape[1], **options)
    y = kernels.matmul(weight_format, pack_tile16(weight_format, planes), x, columns)
    exact = x.astype(np.float64) @ weights.T
    assert np.isfinite(y).all()
    assert (np.abs(y - exact) <= bound(x, weights)).all()
    return y, exact, np.abs(x.astype(np.float64)) @ np.abs(weights).T


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_format", BLOCKED)
def test_awkward_sizes(kernels, weight_format, rows):
    block = max(32, FORMATS[weight_format].block_size)
    for columns, depth in ((16, block), (1, 2 * block), (41, 5 * block)):
        x = np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32) + 0.5
        check(kernels, weight_format, x, columns)


@pytest.mark.parametrize("weight_format", BLOCKED)
def test_error_of_a_long_row(kernels, weight_format):
    x = np.random.default_rng(3).standard_normal((9, 2048)).astype(np.float32)
    y, exact, size = check(kernels, weight_format, x, 48)
    assert np.abs((y - exact) / size).max() < 2e-3  # errors of single activations cancel out


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_format", BLOCKED)
def test_outliers(kernels, weight_format, rows):
    """Groups with a second record in some rows: the bound is that of the records, not of 8 bits."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    x[::2, 5] = 1e4
    x[rows // 2, 300] = -1e4
    planes, weights = random_weights(weight_format, 41, 512)
    y = kernels.matmul(weight_format, pack_tile16(weight_format, planes), x, 41)
    rounded = dequantize_activations(kernels.quantize(x), *x.shape)
    assert np.abs(rounded - x).max() < 1e4 / 254**2
    # Sums are as large on the way as the largest of a group makes them.
    largest = np.repeat(np.abs(x.reshape(rows, -1, 32)).max(-1), 32, axis=-1)
    assert (np.abs(y - rounded @ weights.T) <= ROUNDING / 10 * largest @ np.abs(weights).T).all()


@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("weight_format", BLOCKED)
def test_extreme_activations(kernels, weight_format, size):
    x = (np.random.default_rng(4).uniform(-1, 1, (3, 256)) * size).astype(np.float32)
    x[0, ::2] = 0
    check(kernels, weight_format, x, 17, scale=1e-6)


@pytest.mark.parametrize("scale", [6e-8, 6e-6, 100.0])
@pytest.mark.parametrize("weight_format", BLOCKED)
def test_extreme_scales(kernels, weight_format, scale):
    """Scales that are denormal halves, and large ones."""
    x = np.random.default_rng(5).standard_normal((2, 256)).astype(np.float32)
    check(kernels, weight_format, x, 17, scale=scale)


@pytest.mark.parametrize("weight_format", BLOCKED)
@pytest.mark.parametrize("code", [0, 0x77, 0x88, 0x80, 0xFF])
def test_extreme_codes(kernels, weight_format, code):
    """All codes the same, activations all at the ends of their range: no product of bytes may saturate."""
    depth, columns = 512, 16
    planes, _ = random_weights(weight_format, columns, depth)
    for plane in planes.values():
        plane[...] = 1.0 if plane.dtype == np.float16 else np.uint8(code).view(plane.dtype)
    weights = dequantize(weight_format, [torch.from_numpy(plane) for plane in planes.values()]).double().numpy()
    tiles = pack_tile16(weight_format, planes)
    for sign in (1.0, -1.0):
        x = np.full((3, depth), sign, np.float32)
        x[1:, ::32] = -sign
        y = kernels.matmul(weight_format, tiles, x, columns)
        size = np.abs(x) @ np.abs(weights).T
        assert (np.abs(y - x.astype(np.float64) @ weights.T) <= 1e-5 * size + 1e-3).all()


@pytest.mark.parametrize("weight_format", ["q4_0", "f16"])
@pytest.mark.parametrize("columns", [16, 41, 330])
def test_workgroups_share_all_columns(kernels, weight_format, columns):
    """However many there are: more than pairs of tiles, as many, or fewer, which take unequal shares."""
    planes, _ = random_weights(weight_format, columns, 64)
    tiles = pack_tile16(weight_format, planes)
    x = np.random.default_rng(8).standard_normal((9, 64)).astype(np.float32)
    whole = kernels.matmul(weight_format, tiles, x, columns, workgroups=1)
    assert np.isfinite(whole).all()
    for workgroups in (2, 5, 10, 11, 15):
        np.testing.assert_array_equal(kernels.matmul(weight_format, tiles, x, columns, workgroups), whole)


def test_workgroups_share_all_groups(kernels):
    """A gated layer's second records are the same as well: groups that are compared stay together."""
    rows, columns, depth = 5, 32 * 27, 64
    planes, _ = random_weights("q4_0", 2 * columns, depth)
    tiles = pack_tile16("q4_0", planes)
    codes = kernels.quantize(np.random.default_rng(9).standard_normal((rows, depth)).astype(np.float32))
    whole = read_records(kernels.gated_matmul("q4_0", tiles, codes, rows, columns, depth, workgroups=1), rows, columns)
    for workgroups in (2, 6, 7, 15):
        packed = kernels.gated_matmul("q4_0", tiles, codes, rows, columns, depth, workgroups)
        np.testing.assert_array_equal(read_records(packed, rows, columns), whole)


@pytest.mark.parametrize("weight_format", BLOCKED)
def test_rows_do_not_mix(kernels, weight_format):
    planes, _ = random_weights(weight_format, 40, 512)
    tiles = pack_tile16(weight_format, planes)
    x = np.random.default_rng(6).standard_normal((33, 512)).astype(np.float32)
    x[19:22, 100] = 1e3
    alone = kernels.matmul(weight_format, tiles, x[20:21], 40)
    together = kernels.matmul(weight_format, tiles, x, 40)[20:21]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_its_row_alone(kernels, value):
    planes, _ = random_weights("q4_0", 16, 64)
    planes["qs"][3] = 0x88  # weights that are zero
    x = np.random.default_rng(7).standard_normal((3, 64)).astype(np.float32)
    x[1, 3] = value
    y = kernels.matmul("q4_0", pack_tile16("q4_0", planes), x, 16)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(y[[0, 2]]).all()


def gate(y):
    """silu(gate) * up of float64 [rows, 2 * columns]."""
    gates, ups = torch.from_numpy(y).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gates) * ups).numpy()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_format", BLOCKED)
def test_gated(kernels, weight_format, rows):
    """Against the composition of multiplying, gating and quantising."""
    block = max(32, FORMATS[weight_format].block_size)
    for columns, depth in ((32, block), (96, 2 * block)):
        x = np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32)
        planes, _ = random_weights(weight_format, 2 * columns, depth)
        tiles = pack_tile16(weight_format, planes)
        y = kernels.matmul(weight_format, tiles, x, 2 * columns)
        packed = kernels.gated_matmul(weight_format, tiles, kernels.quantize(x), rows, columns, depth)
        expected = gate(y.astype(np.float64))
        error = np.abs(dequantize_activations(packed, rows, columns) - expected)
        assert (error <= rounding_bound(expected) + 1e-6 * np.abs(expected)).all()


@pytest.mark.parametrize("rows", ROWS)
def test_gated_outliers(kernels, rows):
    """One large product among 8 groups: its group, no other, gets a second record, and keeps its digits."""
    columns, outlier = 256, 200
    planes, _ = random_weights("q8_0", 2 * columns, 64)
    x = np.abs(np.random.default_rng(rows).standard_normal((rows, 64))).astype(np.float32)
    planes["qs"][[outlier, columns + outlier]] = 100
    planes["d"][[outlier, columns + outlier]] = 1.0
    tiles = pack_tile16("q8_0", planes)
    expected = gate(kernels.matmul("q8_0", tiles, x, 2 * columns).astype(np.float64))
    packed = kernels.gated_matmul("q8_0", tiles, kernels.quantize(x), rows, columns, 64)
    has_rest = read_records(packed, rows, columns)["has_rest"][..., 0] != 0
    assert has_rest[:, 6].all()
    assert not has_rest[:, [4, 5, 7]].any()
    error = np.abs(dequantize_activations(packed, rows, columns) - expected)
    assert (error <= rounding_bound(expected, has_rest) + 1e-6 * np.abs(expected)).all()


def test_gates_of_any_size(kernels):
    """Gates far from zero: the exponential stays within its range."""
    planes, weights = random_weights("q8_0", 64, 32, scale=10.0)
    x = np.random.default_rng(8).standard_normal((5, 32)).astype(np.float32)
    tiles = pack_tile16("q8_0", planes)
    expected = gate(kernels.matmul("q8_0", tiles, x, 64).astype(np.float64))
    assert np.abs(x @ weights[:32].T).max() > 1000
    packed = kernels.gated_matmul("q8_0", tiles, kernels.quantize(x), 5, 32, 32)
    error = np.abs(dequantize_activations(packed, 5, 32) - expected)
    assert (error <= rounding_bound(expected) + 1e-6 * np.abs(expected)).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_format", ["f16", "bf16"])
def test_plain_weights(kernels, weight_format, rows):
    """Float32 sums: nothing is lost but their rounding."""
    for columns, depth in ((16, 1), (1, 3), (41, 97), (33, 512)):
        x = np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32)
        planes, weights = random_weights(weight_format, columns, depth)
        y = kernels.matmul(weight_format, pack_tile16(weight_format, planes), x, columns)
        size = np.abs(x.astype(np.float64)) @ np.abs(weights).T
        assert (np.abs(y - x.astype(np.float64) @ weights.T) <= 1e-6 * size).all()


def test_every_half_is_widened_exactly(kernels):
    w = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    y = kernels.matmul("f16", pack_tile16("f16", {"w": w}), np.ones((1, 1), np.float32), len(w), 8)
    np.testing.assert_array_equal(y[0], w[:, 0].astype(np.float32))
