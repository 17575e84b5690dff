"""A plain torch model, matched: what it dispatches on every kind of target."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from llmir_iree.compile import compile_mlir
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target
from tests.plugins.conftest import export_torch

SAMPLE = Path(__file__).parents[2] / "samples" / "match_torch_model.py"


@pytest.fixture(scope="module")
def block() -> str:
    """The sample's model, with any number of pages."""
    sample = runpy.run_path(str(SAMPLE))
    dims = {name: torch.export.Dim(name, min=2, max=1 << 20) for name in ("pages", "table")}
    cache = torch.zeros(9, 2, sample["KV_HEADS"], sample["PAGE_SIZE"], sample["HEAD_DIM"], dtype=torch.float16)
    x = torch.zeros(2, 1, sample["HEADS"] * sample["HEAD_DIM"])
    arguments: tuple[Any, ...] = (x, cache, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    shapes = (None, {0: dims["pages"]}, {1: dims["table"]}, None)
    return export_torch(sample["Block"](), *arguments, dynamic_shapes=shapes)


@pytest.mark.parametrize("name", ["llvm-cpu", "cuda:sm_80", "rocm:gfx942", "metal", "vulkan:rdna3"])
def test_a_call_gathers_no_page_and_unpacks_no_weight(block: str, name: str, tmp_path: Path) -> None:
    target = resolve_target(name)
    lowered = lower(block, target, match=True)
    assert lowered.left_alone == ()
    compile_mlir(lowered.text, tmp_path / "stream.mlir", (*target.flags, "--compile-to=stream"))
    entries = re.findall(r"stream\.cmd\.dispatch (@[^\[(]+)", (tmp_path / "stream.mlir").read_text())
    dispatched = [entry.rpartition("@")[2] for entry in entries if not entry.startswith("@_initializer")]
    assert len([name for name in dispatched if name.startswith("llmir_") and "attention" in name]) in (1, 2)  # a merge
    products = ("llmir_quantized_matmul", "llmir_multiply")
    assert len([name for name in dispatched if name.startswith(products)]) == 2
    # Of what IREE makes itself, there is only the table and the positions as int32.
    others = [name for name in dispatched if not name.startswith("llmir_")]
    assert len(others) == 2
    assert all(name.endswith("i64xi32") for name in others)
