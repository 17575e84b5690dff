"""Random weights in every format that has tiles, and calls of matmuls with them."""

import gguf
import ml_dtypes
import numpy as np
import torch

from llmir_iree.params.formats import FORMATS, split_planes
from llmir_iree.params.layouts import has_tile16, pack_tile16
from llmir_iree.plugins.calls import LlmirCall, TensorType
from tests.plugins.gpu.conftest import type_of

TILED = [name for name in FORMATS if has_tile16(name)]


def make_weights(name: str, rows: int, columns: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Tiles of random weights in a format, and the float64 matrix that they stand for."""
    weight_format = FORMATS[name]
    rng = np.random.default_rng(columns + rows)
    if weight_format.is_quantized:
        nbytes = columns // weight_format.block_size * weight_format.block_bytes
        packed = rng.integers(0, 256, (rows, nbytes), dtype=np.uint8)
        structs = packed.view(weight_format.block_dtype)
        for plane in weight_format.planes:
            if plane.dtype == np.float16:
                structs[plane.name] = rng.standard_normal(structs[plane.name].shape) * 0.1
        exact = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()]).astype(np.float64)
    else:
        weights = rng.standard_normal((rows, columns)).astype(weight_format.planes[0].dtype)
        packed, exact = weights.view(np.uint8), weights.astype(np.float64)
    planes = pack_tile16(name, split_planes(weight_format, packed))
    return [as_tensor(planes[plane.name]) for plane in weight_format.planes], exact


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def matmul_call(name: str, x: TensorType, planes: list[torch.Tensor], rows: int) -> LlmirCall:
    constants = (("format", name), ("layout", "tile16"), ("out_features", rows))
    return LlmirCall(
        "quantized_matmul", (x, *map(type_of, planes)), (TensorType((*x.shape[:2], rows), "f32"),), constants
    )
