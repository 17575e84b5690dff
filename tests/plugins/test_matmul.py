"""`quantized_matmul`, portable and with the kernels of plain weights, compiled, against weights in float64."""

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.params.errors import CompileError
from llmir_iree.params.formats import FORMATS, split_planes
from llmir_iree.params.layouts import TILE16, layout_of, pack_tile16

ROWS = 33  # no multiple of any tile


class Matmul(torch.nn.Module):
    def __init__(self, weight_format: str) -> None:
        super().__init__()
        self.format = weight_format

    def forward(self, x: Any, planes: list[Any]) -> Any:
        return torch.ops.llmir.quantized_matmul(x, planes, self.format, layout_of(self.format).name, ROWS)


def stored(name: str, packed: np.ndarray) -> list[torch.Tensor]:
    """The planes of packed rows, ordered as an archive has them."""
    planes = split_planes(FORMATS[name], packed)
    if layout_of(name) == TILE16:
        planes = pack_tile16(name, planes)
    tensors = []
    for plane in FORMATS[name].planes:
        array = np.ascontiguousarray(planes[plane.name])
        is_bf16 = array.dtype == ml_dtypes.bfloat16
        tensors.append(
            torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bf16 else torch.from_numpy(array)
        )
    return tensors


def make_weights(name: str, columns: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Planes of random weights in a format, and the float64 matrix that they stand for."""
    weight_format = FORMATS[name]
    rng = np.random.default_rng(columns)
    if not weight_format.is_quantized:
        weights = rng.standard_normal((ROWS, columns)).astype(weight_format.planes[0].dtype)
        return stored(name, weights.view(np.uint8)), weights.astype(np.float64)
    nbytes = columns // weight_format.block_size * weight_format.block_bytes
    packed = rng.integers(0, 256, (ROWS, nbytes), dtype=np.uint8)
    structs = packed.view(weight_format.block_dtype)
    for plane in weight_format.planes:
        if plane.dtype == np.float16:
            structs[plane.name] = rng.standard_normal(structs[plane.name].shape) * 0.1
    exact = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()]).astype(np.float64)
    return stored(name, packed), exact


def check(run: Any, x: torch.Tensor, planes: list[torch.Tensor], exact: np.ndarray) -> None:
    (y,) = run(x, *planes)
    expected = x.numpy().astype(np.float64) @ exact.T
    # Summation in float32: the error grows with the sum of magnitudes, not with the result.
    bound = 1e-6 * (np.abs(x.numpy()) @ np.abs(exact).T)
    assert y.shape == expected.shape
    assert (np.abs(y - expected) <= bound + 1e-30).all()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_format_with_one_row_and_with_many(compile_for_cpu: Any, name: str, blocks: int) -> None:
    columns = blocks * max(FORMATS[name].block_size, 32)
    planes, exact = make_weights(name, columns)
    seq = torch.export.Dim("seq", min=2, max=4096)
    shapes = ({1: seq}, [None] * len(planes))
    torch.manual_seed(0)
    many = compile_for_cpu(Matmul(name), torch.randn(1, 5, columns), planes, dynamic_shapes=shapes)
    for rows in (2, 3, 7, 8, 9, 31, 33):
        check(many, torch.randn(1, rows, columns), planes, exact)
    one = compile_for_cpu(Matmul(name), torch.randn(1, 1, columns), planes)
    check(one, torch.randn(1, 1, columns), planes, exact)
    extreme = torch.randn(1, 1, columns)
    extreme[0, 0, ::3] *= 1e15
    extreme[0, 0, 1::3] *= 1e-40
    check(one, extreme, planes, exact)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_kernels_of_plain_weights_are_as_exact(compile_for_cpu: Any, name: str) -> None:
    columns = 33
    planes, exact = make_weights(name, columns)
    seq = torch.export.Dim("seq", min=2, max=4096)
    shapes = ({1: seq}, [None] * len(planes))
    many = compile_for_cpu(
        Matmul(name), torch.randn(1, 5, columns), planes, dynamic_shapes=shapes, implementations="best"
    )
    for rows in (2, 9, 33):
        check(many, torch.randn(1, rows, columns), planes, exact)
    one = compile_for_cpu(Matmul(name), torch.randn(1, 1, columns), planes, implementations="best")
    check(one, torch.randn(1, 1, columns), planes, exact)


def test_a_layout_that_archives_do_not_have_is_refused(compile_for_cpu: Any) -> None:
    class Rows(torch.nn.Module):
        def forward(self, x: Any, w: Any) -> Any:
            return torch.ops.llmir.quantized_matmul(x, [w], "f16", "planes", ROWS)

    with pytest.raises(CompileError, match="f16 is read in layout tile16, not planes"):
        compile_for_cpu(Rows(), torch.randn(1, 1, 32), torch.zeros(ROWS, 32, dtype=torch.float16))
