"""Attention as a form that the compiler makes a dispatch of: what it computes, on the CPU, and what GPUs are given."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import iree.runtime as rt
import numpy as np
import pytest
import torch

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.compile import compile_mlir
from llmir_iree.gpu_code import KernelCode, read_code
from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.gpu import formulations
from llmir_iree.plugins.lowering import Lowering, Preference
from llmir_iree.plugins.seam import choose
from llmir_iree.targets import resolve_target
from tests.plugins.gpu.conftest import Run, load, module_of

LAYERS, LAYER = 3, 1
NAN = float("nan")
TARGETS = ["cuda:sm_80", "cuda:sm_90", "rocm:gfx942", "rocm:gfx1100"]
ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass(frozen=True)
class Case:
    """What one compiled module is specialised for."""

    batch: int = 1
    seq: int | None = 64
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    page_size: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float16

    @property
    def call(self) -> LlmirCall:
        query = TensorType((self.batch, self.seq, self.kv_heads * self.group, self.head_dim), "f32")
        cache = TensorType((None, LAYERS, 2, self.kv_heads, self.page_size, self.head_dim), ELEMENTS[self.dtype])
        table, positions = TensorType((self.batch, None), "i32"), TensorType((self.batch, self.seq), "i32")
        scores = (("scale", self.head_dim**-0.5), ("window", self.window), ("softcap", self.softcap))
        constants = (("layer", LAYER), *scores)
        return LlmirCall("paged_attention", (query, cache, table, positions), (query, cache), constants)


def inputs(case: Case, starts: list[int], lengths: list[int]) -> list[torch.Tensor]:
    """New tokens, right-aligned, and a cache in which everything is a NaN that holds no token of a row.

    Tables have an entry more than the longest row needs; entries that a row does not need name page 0.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * sum(starts))
    seq, size = case.seq or 0, case.page_size
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    entries = 1 + max(2, *(-(-end // size) for end in ends))
    pages = case.batch * entries + 1
    table = (torch.randperm(pages - 1, generator=generator) + 1).reshape(case.batch, entries).to(torch.int32)
    offsets = torch.arange(seq) - seq + torch.tensor(lengths)[:, None]
    positions = torch.where(offsets >= 0, offsets + torch.tensor(starts)[:, None], -1).to(torch.int32)
    query = torch.randn(case.batch, seq, case.kv_heads * case.group, case.head_dim, generator=generator)
    cache = torch.full((pages, LAYERS, 2, case.kv_heads, size, case.head_dim), NAN)
    for row, end in enumerate(ends):
        for entry in range(entries):
            held = min(max(end - entry * size, 0), size)
            page = int(table[row, entry])
            cache[page, LAYER, ..., :held, :] = torch.randn(2, case.kv_heads, held, case.head_dim, generator=generator)
            if held == 0:
                table[row, entry] = 0
    return [query, cache.to(case.dtype), table, positions]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Run]:
    """The form, compiled for the CPU; only how it is tiled is of a GPU, and that is left out."""
    modules: dict[Case, Run] = {}

    def get(case: Case) -> Run:
        if case not in modules:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(formulations, "_attention_tiles", lambda *_: None)
                definition = formulations.paged_attention(case.call, resolve_target("cuda"))
            call, outputs = case.call, [4, 5]
            text = module_of("llvm-cpu", [(call, range(4))], call.operands, outputs, lambda *_: definition, LAYER)
            modules[case] = load(text, "llvm-cpu", rt.get_device("local-sync"), tmp_path_factory.mktemp("compiled"))
        return modules[case]

    return get


def check(run: Run, case: Case, arguments: list[torch.Tensor]) -> None:
    query, cache, table, positions = arguments
    scale = case.head_dim**-0.5
    expected, _ = torch.ops.llmir.paged_attention(
        query, cache.nan_to_num(), table, positions, LAYER, scale, case.window, case.softcap
    )
    output, after = run(*arguments)
    # A query is rounded by 2 ** -11, which moves its scores, of which the largest is about 4, by as much; weights are
    # rounded likewise. In bfloat16 both are 8 times as large.
    bound = 2.0**-6 if case.dtype == torch.bfloat16 else 2.0**-9
    np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=bound)
    assert (output[(positions < 0).numpy()] == 0).all()
    assert np.array_equal(after.astype(np.float32), cache.float().numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 15), (0, 16), (0, 17), (0, 64), (1, 64), (15, 33), (16, 64), (100, 7)]
)
def test_a_chunk_at_page_edges(compiled: Callable[[Case], Run], start: int, length: int) -> None:
    case = Case()
    check(compiled(case), case, inputs(case, [start], [length]))


def test_a_chunk_of_rows_of_unequal_lengths_and_an_idle_one(compiled: Callable[[Case], Run]) -> None:
    case = Case(batch=3, group=1, head_dim=32)
    check(compiled(case), case, inputs(case, [5, 0, 40], [9, 0, 64]))


@pytest.mark.parametrize("start", [0, 14, 15, 16, 77])
def test_a_decode_at_page_edges(compiled: Callable[[Case], Run], start: int) -> None:
    case = Case(batch=2, seq=1)
    check(compiled(case), case, inputs(case, [start, 31], [1, 1]))


@pytest.mark.parametrize("case", [Case(window=7, softcap=3.0), Case(seq=1, window=5, softcap=3.0)])
def test_window_and_softcap(compiled: Callable[[Case], Run], case: Case) -> None:
    check(compiled(case), case, inputs(case, [39], [min(case.seq or 0, 60)]))


def test_bfloat16(compiled: Callable[[Case], Run]) -> None:
    case = Case(dtype=torch.bfloat16, head_dim=128, group=1, kv_heads=1)
    check(compiled(case), case, inputs(case, [13], [64]))


def test_a_nan_that_tokens_see_is_not_hidden(compiled: Callable[[Case], Run]) -> None:
    case = Case()
    query, cache, table, positions = inputs(case, [0], [40])
    cache[int(table[0, 1]), LAYER, 1, :, 4] = NAN  # the value at position 20
    output, _ = compiled(case)(query, cache, table, positions)
    assert np.isnan(output[:, 24 + 20 :]).all()


def code_of(case: Case, target: str, folder: Path, preference: Preference = "best") -> tuple[list[KernelCode], str]:
    """The dispatches of a call, and their text where there is some."""
    resolved = resolve_target(target)
    emit = choose(case.call, Lowering(resolved, preference)).emit
    text = module_of(target, [(case.call, range(4))], case.call.operands, [4, 5], emit, LAYER)
    dumps = [f"--iree-hal-dump-executable-{kind}-to={folder}" for kind in ("binaries", "intermediates")]
    compile_mlir(text, folder / "module.vmfb", (*resolved.flags, *dumps))
    code = "\n".join(file.read_text() for file in folder.iterdir() if file.suffix in (".ptx", ".rocmasm"))
    return read_code(folder, resolved), code


@pytest.mark.parametrize(
    ("target", "head_dim"), [*((target, 64) for target in TARGETS), ("cuda:sm_90", 128), ("rocm:gfx1100", 128)]
)
def test_a_chunk_is_one_dispatch_of_matrix_instructions(target: str, head_dim: int, ptxas: str, tmp_path: Path) -> None:
    case = Case(seq=128, kv_heads=3, head_dim=head_dim, page_size=32)
    lengths, attention = code_of(case, target, tmp_path)[0]
    # One that finds how many positions are stored, and all else.
    assert "reduction" in lengths.name
    assert lengths.instructions < 60
    assert attention.matrix_instructions >= 8
    assert attention.spills == 0
    # On AMD, where code says so: a tile of keys and one of values, and a few bytes to each row for its sake.
    assert (attention.shared_bytes or 0) <= 2 * 32 * (head_dim + 4) * 2 + 64


@pytest.mark.parametrize("target", ["cuda:sm_80", "rocm:gfx1100"])
def test_a_chunk_with_all_options_spills_nothing(target: str, ptxas: str, tmp_path: Path) -> None:
    case = Case(seq=64, head_dim=128, page_size=32, window=100, softcap=30.0, dtype=torch.bfloat16)
    _, attention = code_of(case, target, tmp_path)[0]
    assert attention.matrix_instructions >= 8
    assert attention.spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_decode_is_one_dispatch(target: str, ptxas: str, tmp_path: Path) -> None:
    kernels, code = code_of(Case(seq=1, kv_heads=3, page_size=32), target, tmp_path, "formulations")
    lengths, attention = kernels
    assert lengths.instructions < 60
    assert attention.spills == 0
    # Keys, values and queries, 16 bytes at a time.
    assert len(re.findall(r"ld\.global\.[\w.]*v4|_load_(?:b128|dwordx4)", code)) >= 2 + 3


@pytest.mark.parametrize("target", ["cuda:sm_80", "rocm:gfx942"])
@pytest.mark.parametrize("seq", [64, 1])
def test_pages_are_read_where_they_lie(target: str, seq: int, tmp_path: Path) -> None:
    """Through two layers that append and attend, no dispatch gives pages, and the cache is never copied."""
    case = Case(seq=seq, page_size=32)
    query, cache, table, positions = case.call.operands
    new = TensorType((1, seq, case.kv_heads, case.head_dim), "f32")
    append = LlmirCall("append_kv", (cache, new, new, table, positions), (cache,), (("layer", LAYER),))
    layer = [(append, [3, 1, 2, 4, 5]), (case.call, [0, 6, 4, 5])]
    next_layer = [(append, [8, 1, 2, 4, 5]), (case.call, [7, 9, 4, 5])]
    lowering = Lowering(resolve_target(target), "formulations")
    text = module_of(
        target,
        [*layer, *next_layer],
        [query, new, new, cache, table, positions],
        [10, 11],
        lambda call, target: choose(call, lowering).emit(call, target),
    )
    flags = resolve_target(target).flags
    compile_mlir(text, tmp_path / "flow.mlir", (*flags, "--compile-to=flow"))
    dispatches = re.findall(r"flow\.dispatch @([\w$]+)::.*? : \(.*?\) -> (.*)", (tmp_path / "flow.mlir").read_text())
    assert len([name for name, _ in dispatches if "append_kv" in name]) == 2
    # Both layers share what they find out about lengths.
    assert len(dispatches) == 5
    assert not [results for _, results in dispatches if re.search(r"32x64x(?!.*%)", re.sub(r"%\w+", "", results))]
    compile_mlir(text, tmp_path / "stream.mlir", (*flags, "--compile-to=stream"))
    stream = (tmp_path / "stream.mlir").read_text()
    assert "stream.cmd.dispatch" in stream
    assert not re.findall(r"stream\.(?:cmd|async)\.(?:copy|clone)", stream)


@pytest.mark.parametrize(
    ("target", "case", "best", "compilers"),
    [
        ("cuda:sm_80", Case(), "gpu-matrix", "gpu-matrix"),
        ("rocm:gfx1201", Case(seq=128), "gpu-matrix", "gpu-matrix"),
        ("cuda:sm_80", Case(seq=1), "gpu-kernels", "gpu-lanes"),
        ("cuda:sm_80", Case(seq=None), "gpu-kernels", "gpu-kernels"),
        ("cuda:sm_80", Case(seq=65), "gpu-kernels", "gpu-kernels"),
        ("cuda:sm_80", Case(dtype=torch.float32), "gpu-kernels", "gpu-kernels"),
        ("cuda:sm_80", Case(page_size=8), "gpu-kernels", "gpu-kernels"),
        ("cuda:sm_80", Case(head_dim=96), "gpu-kernels", "gpu-kernels"),
        ("cuda:sm_75", Case(), "gpu-kernels", "gpu-kernels"),
        ("rocm:gfx950", Case(page_size=16), "gpu-kernels", "gpu-kernels"),
        ("rocm:gfx950", Case(page_size=32), "gpu-matrix", "gpu-matrix"),
        ("metal", Case(), "gpu-kernels", "gpu-kernels"),
        ("vulkan:ampere", Case(), "gpu-kernels", "gpu-kernels"),
    ],
)
def test_only_whole_tiles_are_taken(target: str, case: Case, best: str, compilers: str) -> None:
    resolved = resolve_target(target)
    assert choose(case.call, Lowering(resolved)).name == best
    assert choose(case.call, Lowering(resolved, "formulations")).name == compilers
    assert choose(case.call, Lowering(resolved, "kernels")).name == "gpu-kernels"
