"""match-quantized-matmul: which ways of unpacking are taken, that they compute the same, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target
from tests.plugins.conftest import export_torch

TARGETS = ("llvm-cpu", "vulkan:llvmpipe")
ROWS = 33  # no multiple of any tile

# What unpacks weights: operations that must vanish.
UNPACKING = ("torch.aten.__and__", "torch.aten.__rshift__", "torch.aten.stack", "torch.aten.cat", "torch.aten.linear")

Codes = Callable[[Tensor, int], Tensor]
Weights = Callable[[Tensor, Tensor, Tensor], Tensor]


class Linear(torch.nn.Module):
    """A layer whose weights are unpacked, then made of codes [rows, groups, size], scales and something more."""

    def __init__(
        self, codes: Codes, weights: Weights, size: int = 32, columns: int = 128, multiply: Any = F.linear
    ) -> None:
        super().__init__()
        self.unpack, self.scale, self.size, self.multiply = codes, weights, size, multiply
        generator = torch.Generator().manual_seed(columns + size)
        shape = (ROWS, columns // size)
        self.register_buffer("packed", torch.randint(256, (ROWS, columns // 2), dtype=torch.uint8, generator=generator))
        self.register_buffer("scales", torch.rand(shape, generator=generator).half())
        zeros = torch.randint(16, shape, dtype=torch.uint8, generator=generator)
        minima = torch.randn(shape, generator=generator).half()
        self.register_buffer("more", minima if weights is with_minima else zeros)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.matrix())

    def matrix(self) -> Tensor:
        codes = self.unpack(self.packed, self.size)
        return self.scale(codes, self.scales.unsqueeze(-1), self.more.unsqueeze(-1)).reshape(ROWS, -1)


# Ways to unpack codes [rows, groups, size].


def stacked_pairs(packed: Tensor, size: int) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(ROWS, -1, size)


def masked_pairs(packed: Tensor, size: int) -> Tensor:
    low, high = (torch.bitwise_and(shifted, 0xF) for shifted in (packed, packed >> 4))
    return torch.stack((low, high), dim=2).flatten(1).unflatten(1, (-1, size))


def halves_of_a_group(packed: Tensor, size: int) -> Tensor:
    """As GGUF has them."""
    blocks = packed.reshape(ROWS, -1, 16)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).reshape(ROWS, -1, size)


# Ways to make weights of them.


def less_eight(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return (codes.float() - 8) * scales.float()


def less_eight_in_int8(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return scales.float() * (codes.to(torch.int8) - 8).float()


def less_zeros(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (codes.float() - zeros.float()) * scales.float()


def with_minima(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return codes.float() * scales.float() + minima.float()


def transposed(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix.T


def with_bias(x: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(x, matrix, torch.arange(ROWS).float())


WAYS: list[tuple[Codes, Weights, int, Any, str]] = [
    (stacked_pairs, less_eight, 32, F.linear, "q4_0"),
    (masked_pairs, less_eight_in_int8, 64, with_bias, "q4_0"),
    (halves_of_a_group, less_zeros, 32, transposed, "q4_1"),
    (stacked_pairs, with_minima, 128, F.linear, "q4_1"),
    (halves_of_a_group, with_minima, 64, F.linear, "q4_1"),
]


@pytest.mark.parametrize(("codes", "weights", "size", "multiply", "weight_format"), WAYS)
def test_every_way_becomes_the_op_and_unpacks_nothing(
    codes: Codes, weights: Weights, size: int, multiply: Any, weight_format: str, run_passes: Callable[..., Any]
) -> None:
    text = export_torch(Linear(codes, weights, size, multiply=multiply), torch.randn(1, 3, 128))
    after = run_passes(text, "match-quantized-matmul")
    assert after.llmir() == {"quantized_matmul": 1}
    assert not [name for name in after.counts if name.startswith(UNPACKING)]
    assert f'torch.constant.str "{weight_format}"' in after.text
    # The bytes are put into tiles when the module is loaded: 3 of 16 rows, 4 groups.
    assert "util.initializer" in after.text
    assert "!torch.vtensor<[3,4,4,16,4],ui8>" in after.text
    assert after.counts["torch.aten.add.Tensor"] == (multiply is with_bias)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("codes", "weights", "size", "multiply", "weight_format"), WAYS)
def test_every_way_agrees_with_torch(
    codes: Codes,
    weights: Weights,
    size: int,
    multiply: Any,
    weight_format: str,
    target: str,
    run_matched: Callable[..., Any],
) -> None:
    module = Linear(codes, weights, size, multiply=multiply)
    x = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(1))
    text = export_torch(module, x, dynamic_shapes=({1: torch.export.Dim("seq", min=2, max=64)},))
    lowered, output = run_matched(text, target, x, implementations="portable" if target == "llvm-cpu" else "best")
    assert lowered.left_alone == ()
    assert lowered.implementations == {"quantized_matmul": {"portable" if target == "llvm-cpu" else "gpu-kernels": 1}}
    check(output, module, x, with_zeros=weights is less_zeros)


def check(output: np.ndarray, module: Linear, x: Tensor, *, with_zeros: bool = False) -> None:
    matrix, activations = module.matrix().double().numpy(), x.double().numpy()
    expected = module.multiply(x.double(), module.matrix().double()) if module.multiply is not with_bias else module(x)
    # Summation in float32.
    bound = 2e-6 * (np.abs(activations) @ np.abs(matrix).T) + 1e-5
    if with_zeros:  # Minima are rounded to float16: half a unit in the last of 11 bits.
        minima = (module.scales.float() * module.more.float()).double().numpy()
        bound += np.abs(activations) @ np.repeat(np.abs(minima), module.size, axis=1).T * 2.0**-11
    assert output.shape == expected.shape
    assert (np.abs(output - expected.numpy()) <= bound).all()


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 33, 64), (9, 64)])
def test_kernels_of_the_cpu_take_what_is_matched(shape: tuple[int, ...], run_matched: Callable[..., Any]) -> None:
    module = Linear(stacked_pairs, less_zeros, columns=64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    lowered, output = run_matched(export_torch(module, x), "llvm-cpu", x)
    assert lowered.implementations == {"quantize_activations": {"cpu-kernels": 1}, "multiply": {"cpu-kernels": 1}}
    expected = module(x).numpy()
    assert np.abs(output - expected).max() < 0.02 * np.abs(expected).max()  # activations of 8 bits


class Given(torch.nn.Module):
    """The same of weights that are arguments."""

    def forward(self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return x @ less_zeros(stacked_pairs(packed, 32), scales[..., None], zeros[..., None]).flatten(1).T


@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_are_arguments_are_put_into_tiles_in_each_call(
    target: str, run_matched: Callable[..., Any], run_passes: Callable[..., Any]
) -> None:
    module = Linear(stacked_pairs, less_zeros)
    x = torch.randn(1, 2, 128, generator=torch.Generator().manual_seed(3))
    arguments = (x, module.packed, module.scales, module.more)
    text = export_torch(Given(), *arguments)
    assert "util.initializer" not in run_passes(text, "match-quantized-matmul").text
    lowered, output = run_matched(text, target, *arguments, implementations="kernels" if ":" in target else "portable")
    assert sum(lowered.implementations["quantized_matmul"].values()) == 1
    check(output, module, x, with_zeros=True)


class Twice(torch.nn.Module):
    """Two products by the same weights, which are unpacked for each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(stacked_pairs, less_eight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(x * 2)


def test_tiles_are_made_once(run_passes: Callable[..., Any]) -> None:
    after = run_passes(export_torch(Twice(), torch.randn(1, 1, 128)), "match-quantized-matmul")
    assert after.llmir() == {"quantized_matmul": 2}
    # Scales are so few that the export writes them where they are used.
    assert after.text.count("util.global private @llmir_tiles_") == after.counts["util.initializer"] == 1


@pytest.mark.parametrize("order", ["pairs", "halves"])
def test_tiles_hold_the_same_bits(order: str, run_matched: Callable[..., Any]) -> None:
    """The product by the unit matrix is the weights."""
    codes = stacked_pairs if order == "pairs" else halves_of_a_group
    module = Linear(codes, less_eight, columns=64)
    unit = torch.eye(64)[None]
    _, output = run_matched(export_torch(module, unit), "llvm-cpu", unit, implementations="portable")
    np.testing.assert_array_equal(output[0].T, module.matrix().numpy())


# Near misses.


def upper_first(packed: Tensor, size: int) -> Tensor:
    return torch.stack((packed >> 4, packed & 15), dim=-1).reshape(ROWS, -1, size)


def halves_of_a_row(packed: Tensor, size: int) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).reshape(ROWS, -1, size)


def lower_twice(packed: Tensor, size: int) -> Tensor:
    return torch.stack((packed & 15, (packed >> 0) & 15), dim=-1).reshape(ROWS, -1, size)


def of_three_bits(packed: Tensor, size: int) -> Tensor:
    return torch.stack((packed & 7, packed >> 4), dim=-1).reshape(ROWS, -1, size)


def other_rows(packed: Tensor, size: int) -> Tensor:
    return torch.stack((packed & 15, packed.flip(0) >> 4), dim=-1).reshape(ROWS, -1, size)


def rows_last(packed: Tensor, size: int) -> Tensor:
    """Bytes of one column of all rows side by side."""
    columns_first = packed.reshape(-1, ROWS)
    return torch.stack((columns_first & 15, columns_first >> 4), dim=1).flatten(0, 1).T.reshape(ROWS, -1, size)


def less_seven(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return (codes.float() - 7) * scales.float()


def less_eight_twice(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return ((codes.float() - 1) - 8) * scales.float()


def wrapping(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return (codes - 8).float() * scales.float()


def float32_scales(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return (codes.float() - 8) * (scales.float() * 1.1)


def zeros_after_scaling(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return codes.float() * scales.float() - zeros.float()


def squared(codes: Tensor, scales: Tensor, _: Tensor) -> Tensor:
    return ((codes.float() - 8) * scales.float()) ** 2


def columns_exchanged(x: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(x, matrix.reshape(ROWS, 2, -1).transpose(1, 2).reshape(ROWS, -1))


def in_float16(x: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(x.half(), matrix.half()).float()


NEAR_MISSES: list[tuple[Codes, Weights, int, Any, str]] = [
    (upper_first, less_eight, 32, F.linear, "the lower nibbles of bytes do not come first"),
    (halves_of_a_row, less_eight, 32, F.linear, "neither neighbouring columns nor those 16 apart"),
    (lower_twice, less_eight, 32, F.linear, "nibbles are not 4 bits"),
    (of_three_bits, less_eight, 32, F.linear, "a mask of nibbles is not 15"),
    (other_rows, less_eight, 32, F.linear, "the upper ones of the same bytes"),
    (rows_last, less_eight, 32, F.linear, "codes are not nibbles of"),
    (stacked_pairs, less_eight, 16, F.linear, "16 columns, which is no multiple of 32"),
    (stacked_pairs, less_seven, 32, F.linear, "codes are not 8 above their weights"),
    (stacked_pairs, less_eight_twice, 32, F.linear, "codes are shifted more than once"),
    (stacked_pairs, wrapping, 32, F.linear, "wrap around"),
    (stacked_pairs, float32_scales, 32, F.linear, "scales are f32, not float16"),
    (stacked_pairs, zeros_after_scaling, 32, F.linear, "weights are not scale"),
    (stacked_pairs, squared, 32, F.linear, "weights are not scaled as"),
    (stacked_pairs, less_eight, 32, columns_exchanged, "not the columns of a row, in their order"),
    (stacked_pairs, less_eight, 32, in_float16, "it is not float32 that is multiplied"),
]


@pytest.mark.parametrize(("codes", "weights", "size", "multiply", "reason"), NEAR_MISSES)
def test_near_misses_are_left_alone_and_told(
    codes: Codes, weights: Weights, size: int, multiply: Any, reason: str
) -> None:
    text = export_torch(Linear(codes, weights, size, multiply=multiply), torch.randn(1, 3, 128))
    lowered = lower(text, resolve_target("llvm-cpu"), match=True)
    assert lowered.implementations == {}
    [line] = lowered.left_alone
    assert line.startswith("product by unpacked weights number 1, vtensor<[33,128],")
    assert reason in line


def test_float_weights_are_none_of_its_business() -> None:
    text = export_torch(torch.nn.Linear(64, 8), torch.randn(1, 1, 64))
    assert lower(text, resolve_target("llvm-cpu"), match=True).left_alone == ()
