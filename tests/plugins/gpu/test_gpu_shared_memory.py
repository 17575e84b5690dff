"""Kernels keep to the memory that every device lets a workgroup share."""

import re
from math import prod

import pytest

from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.gpu import attention, matmul
from llmir_iree.targets import resolve_target
from tests.plugins.gpu.conftest import LAVAPIPE
from tests.plugins.gpu.weights import make_weights, matmul_call

SHARED_BYTES = 32 << 10
ALLOCATION = re.compile(r"memref\.alloc\(\) : memref<([\dx]+)x(?:f32|vector<(4)xf32>), #gpu\.address_space<workgroup>>")

# Subgroups of 8, 32 and 64 lanes.
TARGETS = [LAVAPIPE, "metal", "rocm:gfx942"]


def shared_bytes(kernel: str) -> int:
    """What a workgroup of a kernel shares."""
    found = ALLOCATION.findall(kernel)
    assert len(found) == kernel.count("memref.alloc()")
    return sum(4 * int(numbers or 1) * prod(map(int, shape.split("x"))) for shape, numbers in found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", attention.CACHE_ELEMENTS)
@pytest.mark.parametrize("seq", [1, 128])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, attention.LARGEST_HEAD])
@pytest.mark.parametrize("group", [1, 7, 8, 16])
def test_attention(target: str, element: str, seq: int, head_dim: int, group: int) -> None:
    query = TensorType((1, seq, 2 * group, head_dim), "f32")
    cache = TensorType((None, 2, 2, 2, 32, head_dim), element)
    table, positions = TensorType((1, None), "i32"), TensorType((1, seq), "i32")
    constants = (("layer", 0), ("scale", 1.0), ("window", 0), ("softcap", 0.0))
    call = LlmirCall("paged_attention", (query, cache, table, positions), (query, cache), constants)
    definitions = attention.paged_attention(call, resolve_target(target))
    assert max(map(shared_bytes, definitions.values())) in range(1, SHARED_BYTES + 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 8, 16, None])
def test_matmul(target: str, rows: int | None) -> None:
    planes, _ = make_weights("q4_0", 16, 8192)
    call = matmul_call("q4_0", TensorType((1, rows, 8192), "f32"), planes, 16)
    definitions = matmul.quantized_matmul(call, resolve_target(target))
    assert max(map(shared_bytes, definitions.values())) in range(1, SHARED_BYTES + 1)
