"""A lookup in packed weights, compiled, against the same rows dequantised in torch: every format in every layout."""

from typing import Any

import numpy as np
import pytest
import torch

from llmir_iree.export.dequantize import dequantize, look_up
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import has_tile16, pack_tile16

ROWS, BLOCKS = 37, 2


class Lookup(torch.nn.Module):
    def __init__(self, weight_format: str, layout: str) -> None:
        super().__init__()
        self.format, self.layout = weight_format, layout

    def forward(self, ids: Any, planes: list[Any]) -> Any:
        return look_up(self.format, self.layout, planes, ids.long())


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


def tiles(name: str, planes: list[torch.Tensor]) -> list[torch.Tensor]:
    """The planes in layout tile16."""
    named = {plane.name: values for plane, values in zip(FORMATS[name].planes, planes, strict=True)}
    # numpy has no bfloat16 of torch's: its bits will do, as nothing but their order changes.
    bits = {
        key: values.view(torch.int16) if values.dtype == torch.bfloat16 else values for key, values in named.items()
    }
    packed = pack_tile16(name, {key: values.numpy() for key, values in bits.items()})
    return [torch.from_numpy(packed[key]).view(values.dtype) for key, values in named.items()]


STORED = [(name, "planes") for name in FORMATS] + [(name, "tile16") for name in FORMATS if has_tile16(name)]


@pytest.mark.parametrize(("name", "layout"), STORED)
def test_equals_torch(compile_for_cpu: Any, name: str, layout: str) -> None:
    planes = random_planes(name)
    stored = planes if layout == "planes" else tiles(name, planes)
    ids = torch.tensor([[36, 0, 3, 3, 16]], dtype=torch.int32)
    (got,) = compile_for_cpu(Lookup(name, layout), ids, stored)(ids, *stored)
    np.testing.assert_allclose(got, dequantize(name, planes)[ids].numpy(), rtol=1e-6, atol=1e-6)
