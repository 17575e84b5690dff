"""`quantized_matmul` by GPU kernels, on lavapipe, against weights in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from llmir_iree.plugins.calls import TensorType
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.seam import choose
from llmir_iree.targets import resolve_target
from tests.plugins.gpu.conftest import LAVAPIPE
from tests.plugins.gpu.weights import TILED, make_weights, matmul_call


def check(
    run_on_lavapipe: Any, name: str, rows: int, columns: int, batch: int, seqs: list[int], seq: int | None
) -> None:
    planes, exact = make_weights(name, rows, columns)
    call = matmul_call(name, TensorType((batch, seq, columns), "f32"), planes, rows)
    run = run_on_lavapipe([(call, range(len(call.operands)))], call.operands, [len(call.operands)])
    torch.manual_seed(0)
    for length in seqs:
        x = torch.randn(batch, length, columns)
        (y,) = run(x, *planes)
        expected = x.numpy().astype(np.float64) @ exact.T
        # Summation in float32, where a code and its minimum may cancel: codes go up to 63, what they stand for is
        # compared with the magnitudes of the weights.
        bound = 4e-6 * (np.abs(x.numpy()) @ np.abs(exact).T)
        assert y.shape == expected.shape
        assert (np.abs(y - expected) <= bound).all(), np.max(np.abs(y - expected) / bound)


@pytest.mark.parametrize("name", TILED)
def test_every_format_with_one_row(run_on_lavapipe: Any, name: str) -> None:
    check(run_on_lavapipe, name, 33, 768, 1, [1], 1)


@pytest.mark.parametrize("name", TILED)
def test_every_format_with_many_rows(run_on_lavapipe: Any, name: str) -> None:
    check(run_on_lavapipe, name, 33, 256, 1, [2, 3, 7, 8, 9, 31, 33, 65], None)


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 16, 17, 31, 33])
def test_a_known_number_of_rows(run_on_lavapipe: Any, rows: int) -> None:
    check(run_on_lavapipe, "q4_1", 40, 96, rows, [1], 1)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 127, 129, 576])
def test_awkward_numbers_of_weights(run_on_lavapipe: Any, columns: int) -> None:
    check(run_on_lavapipe, "q4_0", columns, 64, 1, [1], 1)
    check(run_on_lavapipe, "q4_0", columns, 64, 2, [33], None)


@pytest.mark.parametrize("depth", [32, 512, 544, 5632])
def test_a_row_is_shared_out_to_few_threads_or_to_many(run_on_lavapipe: Any, depth: int) -> None:
    check(run_on_lavapipe, "q8_0", 16, depth, 1, [1], 1)


def test_only_tiles_of_whole_groups_are_taken() -> None:
    lowering = Lowering(resolve_target(LAVAPIPE))
    planes, _ = make_weights("f16", 16, 33)
    call = matmul_call("f16", TensorType((1, 1, 33), "f32"), planes, 16)
    assert choose(call, lowering).name == "portable"
    planes, _ = make_weights("q4_0", 16, 64)
    call = matmul_call("q4_0", TensorType((1, 1, 64), "f32"), planes, 32)
    assert choose(call, lowering).name != "gpu-kernels"
