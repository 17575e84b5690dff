"""Compiles a torch module that calls the `llmir` ops, runs it with IREE, and compares it with torch.

The module is one attention over a paged cache, with a packed matrix that makes queries, keys and values.
"""

import tempfile
from pathlib import Path

import iree.runtime as rt
import numpy as np
import torch
from iree.turbine import aot
from torch import Tensor, nn

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.compile import compile_mlir
from llmir_iree.params.formats import FORMATS, split_planes
from llmir_iree.params.layouts import TILE16, pack_tile16
from llmir_iree.params.quantize import quantize
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target

FORMAT = "q8_0"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
PAGES, LAYERS, PAGE_SIZE = 4, 1, 8
SPLIT = [HEADS, KV_HEADS, KV_HEADS]


class Attention(nn.Module):
    """x [batch, seq, hidden] -> (output [batch, seq, heads * head_dim], cache)."""

    def forward(
        self, x: Tensor, planes: list[Tensor], page_table: Tensor, positions: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Project, store keys and values, attend."""
        ops, layer, window, softcap = torch.ops.llmir, 0, 0, 0.0
        projected = ops.quantized_matmul(x, planes, FORMAT, TILE16.name, sum(SPLIT) * HEAD_DIM)
        query, key, value = projected.unflatten(-1, (-1, HEAD_DIM)).split(SPLIT, dim=-2)
        cache = ops.append_kv(cache, key, value, page_table, positions, layer)
        output, cache = ops.paged_attention(query, cache, page_table, positions, layer, HEAD_DIM**-0.5, window, softcap)
        return output.flatten(-2), cache


def make_planes() -> list[Tensor]:
    """A random matrix [(heads + 2 * kv_heads) * head_dim, hidden], packed."""
    weights = np.random.default_rng(0).standard_normal((sum(SPLIT) * HEAD_DIM, HIDDEN), np.float32)
    planes = pack_tile16(FORMAT, split_planes(FORMATS[FORMAT], quantize(weights, FORMAT)))
    return [torch.from_numpy(plane) for plane in planes.values()]


def main() -> None:
    """Trace, lower, compile, run, compare."""
    seq = 11
    x = torch.randn(1, seq, HIDDEN, generator=torch.Generator().manual_seed(0))
    page_table = torch.tensor([[3, 1]], dtype=torch.int32)
    positions = torch.arange(seq, dtype=torch.int32)[None]
    cache = torch.zeros(PAGES, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=torch.float16)
    arguments = (x, make_planes(), page_table, positions, cache)

    dims = {name: torch.export.Dim(name, min=2) for name in ("seq", "table", "pages")}
    shapes = ({1: dims["seq"]}, [None, None], {1: dims["table"]}, {1: dims["seq"]}, {0: dims["pages"]})
    exported = torch.export.export(Attention(), arguments, dynamic_shapes=shapes, strict=False)
    portable = str(aot.export(exported).mlir_module)
    target = resolve_target("llvm-cpu")
    lowered = lower(portable, target, "portable")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "attention.vmfb"
        compile_mlir(lowered.text, file, target.flags)
        module = rt.load_vm_flatbuffer_file(str(file), driver=target.driver)
    flat = (x, *arguments[1], page_table, positions, cache)
    output, _cache = module.main(*(tensor.numpy() for tensor in flat))

    expected, _ = Attention()(*arguments)
    difference = np.abs(output.to_host() - expected.numpy()).max()
    print(f"{portable.count('torch.llmir.')} ops, passes: {', '.join(lowered.passes)}")
    print(f"largest difference from torch: {difference:.1e}, of values up to {expected.abs().max():.1f}")
    if difference > 1e-4:
        raise SystemExit("IREE and torch disagree")


if __name__ == "__main__":
    main()
