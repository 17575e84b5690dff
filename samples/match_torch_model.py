"""Compiles a plain torch model, which knows nothing of llmir, with the kernels for its attention and its 4-bit weights.

The model is a block of a decode step: queries of a 4-bit layer attend over pages that a block table gathers from a
cache, and another 4-bit layer takes what they find.
"""

import tempfile
from pathlib import Path

import iree.runtime as rt
import numpy as np
import torch
import torch.nn.functional as F
from iree.turbine import aot
from torch import Tensor, nn

from llmir_iree.compile_module import compile_module
from llmir_iree.targets import resolve_target

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, GROUP = 8, 2, 32, 16, 32


class Linear4Bit(nn.Module):
    """Weights of 4 bits, two neighbours to a byte: scale * (code - zero), one scale and one zero for 32 columns."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8))
        self.register_buffer("scales", (torch.rand(rows, columns // GROUP) * 0.02).half())
        self.register_buffer("zeros", torch.randint(6, 11, (rows, columns // GROUP), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Unpack, scale, multiply."""
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).reshape(*self.scales.shape, GROUP)
        weights = (codes.float() - self.zeros.unsqueeze(-1).float()) * self.scales.unsqueeze(-1).float()
        return F.linear(x, weights.flatten(1))


class Block(nn.Module):
    """x [batch, 1, hidden] -> [batch, 1, hidden], over a cache [pages, 2, kv_heads, page_size, head_dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = Linear4Bit(HEADS * HEAD_DIM, HEADS * HEAD_DIM)
        self.output = Linear4Bit(HEADS * HEAD_DIM, HEADS * HEAD_DIM)

    def forward(self, x: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """Attend to the first `lengths` tokens of the pages that the rows of the table name."""
        query = self.queries(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        pages = cache[table].permute(2, 0, 3, 1, 4, 5)  # key and value, batch, kv_heads, pages, page_size, head_dim
        key, value = pages.flatten(3, 4).float()
        mask = torch.arange(key.shape[2]) < lengths[:, None, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.output(attended.transpose(1, 2).flatten(2))


def main() -> None:
    """Export, compile, run, compare."""
    torch.manual_seed(0)
    model, batch = Block(), 2
    x = torch.randn(batch, 1, HEADS * HEAD_DIM)
    cache = torch.randn(9, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM).half()
    table, lengths = torch.tensor([[3, 7, 1], [5, 2, 0]]), torch.tensor([41, 19])
    arguments = (x, cache, table, lengths)
    dims = {name: torch.export.Dim(name, min=2, max=1 << 20) for name in ("pages", "table")}
    exported = torch.export.export(
        model, arguments, dynamic_shapes=(None, {0: dims["pages"]}, {1: dims["table"]}, None)
    )
    with tempfile.TemporaryDirectory() as folder:
        source, file = Path(folder) / "block.mlir", Path(folder) / "block.vmfb"
        aot.export(exported).save_mlir(source)
        # As `llmir-compile block.mlir --match -o block.vmfb` does.
        compiled = compile_module(source, resolve_target("llvm-cpu"), file, match=True)
        module = rt.load_vm_flatbuffer_file(str(file), driver=compiled.driver)
    for op, names in compiled.implementations.items():
        print(f"{op}: " + ", ".join(f"{count} by {name}" for name, count in names.items()))
    output = module.main(*(argument.numpy() for argument in arguments)).to_host()

    expected = model(*arguments).numpy()
    difference = np.abs(output - expected).max() / np.abs(expected).max()
    print(f"largest difference from torch: {difference:.1e} of the largest value")
    if compiled.left_alone or difference > 0.02:  # The kernels round activations to 8 bits.
        raise SystemExit(f"something was left alone, or IREE and torch disagree: {compiled.left_alone}")


if __name__ == "__main__":
    main()
