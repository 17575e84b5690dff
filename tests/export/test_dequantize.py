"""The torch meaning of every format, against the `gguf` package's own."""

import gguf
import numpy as np
import pytest
import torch

from llmir_iree.export.dequantize import dequantize, look_up, matrix
from llmir_iree.params.errors import ParameterError
from llmir_iree.params.formats import FORMATS, WeightFormat, split_planes
from llmir_iree.params.layouts import has_tile16, pack_tile16

QUANTIZED = [name for name, weight_format in FORMATS.items() if weight_format.is_quantized]


def random_blocks(weight_format: WeightFormat, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Blocks of every bit pattern, with floats that are finite: uint8 [rows, bytes of a row]."""
    rng = np.random.default_rng(seed)
    nbytes = columns // weight_format.block_size * weight_format.block_bytes
    blocks = rng.integers(0, 256, (rows, nbytes), dtype=np.uint8)
    structs = blocks.view(weight_format.block_dtype)
    for plane in weight_format.planes:
        if plane.dtype == np.float16:
            structs[plane.name] = rng.standard_normal(structs[plane.name].shape) * 0.1
    return blocks


def planes_of(weight_format: WeightFormat, blocks: np.ndarray) -> list[torch.Tensor]:
    planes = split_planes(weight_format, blocks)
    return [torch.from_numpy(np.ascontiguousarray(planes[plane.name])) for plane in weight_format.planes]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_gguf_bit_for_bit(name: str, blocks: int) -> None:
    weight_format = FORMATS[name]
    packed = random_blocks(weight_format, 5, blocks * weight_format.block_size)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(dequantize(name, planes_of(weight_format, packed)).numpy(), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_takes_rows_in_any_shape(name: str) -> None:
    weight_format = FORMATS[name]
    planes = planes_of(weight_format, random_blocks(weight_format, 6, 2 * weight_format.block_size))
    ids = torch.tensor([[5, 0, 0], [2, 3, 1]])
    looked_up = dequantize(name, [plane[ids] for plane in planes])
    assert torch.equal(looked_up, dequantize(name, planes)[ids])


@pytest.mark.parametrize("name", [name for name in QUANTIZED if has_tile16(name)])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_tiles_mean_the_same_as_planes(name: str, rows: int) -> None:
    weight_format = FORMATS[name]
    planes = planes_of(weight_format, random_blocks(weight_format, rows, 3 * weight_format.block_size))
    tiles = pack_tile16(
        name, split_planes(weight_format, random_blocks(weight_format, rows, 3 * weight_format.block_size))
    )
    tile_planes = [torch.from_numpy(tiles[plane.name]) for plane in weight_format.planes]
    expected = dequantize(name, planes)
    assert torch.equal(matrix(name, "planes", planes, rows), expected)
    assert torch.equal(matrix(name, "tile16", tile_planes, rows), expected)
    ids = torch.tensor([[rows - 1, 0], [rows // 2, rows - 1]])
    assert torch.equal(look_up(name, "planes", planes, ids), expected[ids])
    assert torch.equal(look_up(name, "tile16", tile_planes, ids), expected[ids])


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ParameterError, match="unknown layout 'tile32' of weights; known: planes, tile16"):
        matrix("f32", "tile32", [torch.zeros(2, 2)], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_formats_are_only_widened(dtype: torch.dtype) -> None:
    weights = torch.linspace(-2, 2, 12).reshape(3, 4).to(dtype)
    name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    assert torch.equal(dequantize(name, [weights]), weights.float())
