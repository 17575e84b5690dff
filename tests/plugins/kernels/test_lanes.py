"""The vectors that kernels are written in, against numpy."""

import numpy as np
import pytest


def dot(kernels, function, a, b):
    sums = np.arange(len(a) * 16, dtype=np.int32).reshape(-1, 16) - 50
    expected = sums + (a.astype(np.int32) * b).sum((1, 3))
    kernels.dispatch(f"lanes_{function}", (sums, a, b), [()], lambda _: (len(a),))
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("most", [15, 31, 63, 127])
def test_dot_products_of_codes_are_exact(kernels, most):
    rng = np.random.default_rng(0)
    a = rng.integers(0, most + 1, (50, 8, 16, 4), np.uint8)
    b = rng.integers(-128, 128, (50, 8, 16, 4), np.int8)
    dot(kernels, f"dot_{most}", a, b)
    # The ends of both ranges, in all combinations of two neighbours: no sum may saturate or wrap around on the way.
    a = rng.choice(np.uint8([0, 1, most - 1, most]), (200, 8, 16, 4))
    b = rng.choice(np.int8([-128, -127, 127]), (200, 8, 16, 4))
    dot(kernels, f"dot_{most}", a, b)
    for end in (-128, 127):
        dot(kernels, f"dot_{most}", np.full((1, 8, 16, 4), most, np.uint8), np.full((1, 8, 16, 4), end, np.int8))


def test_dot_products_of_bytes_are_exact(kernels):
    """Of any bytes with activations, which are above -128."""
    rng = np.random.default_rng(1)
    a = rng.integers(-128, 128, (50, 8, 16, 4), np.int8)
    b = rng.integers(-127, 128, (50, 8, 16, 4), np.int8)
    dot(kernels, "dot_bytes", a, b)
    a = rng.choice(np.int8([-128, -127, -1, 0, 1, 127]), (200, 8, 16, 4))
    b = rng.choice(np.int8([-127, 127]), (200, 8, 16, 4))
    dot(kernels, "dot_bytes", a, b)


def test_every_half_is_widened_exactly(kernels):
    halves = np.arange(2**16, dtype=np.uint16)
    wide, wide_by_one = np.zeros((2, 2**16), np.float32)
    kernels.dispatch("lanes_widen", (halves, wide, wide_by_one), [()], lambda _: (2**16,))
    expected = halves.view(np.float16).astype(np.float32)
    for result in (wide, wide_by_one):
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(np.signbit(result), np.signbit(expected))


def test_floats_are_rounded_to_the_nearest_half(kernels):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate([np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)])
    values = np.concatenate([finite, ties, near, np.float32([65519.99, 65520, -65520, 1e38, np.inf, -np.inf])])
    values = np.concatenate([values, np.zeros(-len(values) % 16, np.float32)])
    narrow, narrow_by_one = np.zeros((2, len(values)), np.float16)
    kernels.dispatch("lanes_narrow", (values, narrow, narrow_by_one), [()], lambda _: (len(values),))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    for result in (narrow, narrow_by_one):
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(np.signbit(result), np.signbit(expected))


@pytest.mark.parametrize("lane", [0, 1, 2, 4, 8, 15])
def test_reductions_take_in_every_lane(kernels, lane):
    x = np.random.default_rng(lane).integers(-99, 99, 16).astype(np.float32)
    x[lane] = 1000
    floats, integers = np.zeros(2, np.float32), np.zeros(2, np.int32)
    kernels.dispatch("lanes_reduce", (x, floats, integers), [()], lambda _: ())
    bits = x.view(np.int32)
    assert floats.tolist() == [x.max(), x.sum()]
    assert integers.tolist() == [bits.max(), (bits >> 8).sum(dtype=np.int32)]


def test_exponential_and_hyperbolic_tangent(kernels):
    x = np.linspace(-87, 88, 16 * 1000, dtype=np.float32)
    exp, tanh = np.zeros((2, len(x)), np.float32)
    kernels.dispatch("lanes_functions", (x, exp, tanh), [()], lambda _: (len(x) // 16,))
    np.testing.assert_allclose(exp, np.exp(x.astype(np.float64)), rtol=3e-7)
    np.testing.assert_allclose(tanh, np.tanh(x.astype(np.float64)), rtol=0, atol=3e-7)


def test_arguments_reach_their_places(kernels):
    """However many there are: a kernel in another process is called through a type that is not its own."""
    out = np.zeros(1, np.int32)
    values = (np.int32([1]), np.int32([1]), 1, 1.0, 1, 1, 1.0, 1, 1)
    for index in range(len(values)):
        chosen = [value if i == index else value * 0 for i, value in enumerate(values)]
        kernels.dispatch("lanes_arguments", (out, *chosen[:2]), [()], lambda _, scalars=chosen[2:]: scalars)
        assert out[0] == [1, 2, 4, 64, 8, 16, 128, 32, 256][index]
