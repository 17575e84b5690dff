"""A lookup in packed weights, compiled, against the same rows dequantised in torch: every format a table may have."""

from typing import Any

import numpy as np
import pytest
import torch

from llmir_iree.export.dequantize import dequantize
from llmir_iree.params.formats import FORMATS

ROWS, BLOCKS = 7, 2


class Lookup(torch.nn.Module):
    def __init__(self, weight_format: str) -> None:
        super().__init__()
        self.format = weight_format

    def forward(self, ids: Any, planes: list[Any]) -> Any:
        return dequantize(self.format, [plane[ids.long()] for plane in planes])


def random_planes(name: str) -> list[torch.Tensor]:
    """Planes of every bit pattern, with floats that are finite."""
    generator = torch.Generator().manual_seed(len(name))
    planes = []
    for plane in FORMATS[name].planes:
        shape = plane.shape(ROWS, BLOCKS * max(1, 32 // FORMATS[name].block_size))
        if plane.dtype.kind in "iu":
            info = np.iinfo(plane.dtype)
            values = torch.randint(int(info.min), int(info.max) + 1, shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator)
        planes.append(values.to(getattr(torch, plane.dtype.name)))
    return planes


@pytest.mark.parametrize("name", list(FORMATS))
def test_equals_torch(compile_for_cpu: Any, name: str) -> None:
    planes = random_planes(name)
    ids = torch.tensor([[6, 0, 3, 3]], dtype=torch.int32)
    (got,) = compile_for_cpu(Lookup(name), ids, planes)(ids, *planes)
    np.testing.assert_allclose(got, dequantize(name, planes)[ids].numpy(), rtol=1e-6, atol=1e-6)
