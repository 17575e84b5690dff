"""`append_kv` and `paged_attention` by GPU kernels, on lavapipe, against the ops' eager definitions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.plugins.calls import LlmirCall, TensorType
from tests.plugins.gpu.conftest import type_of

PAGE_SIZE, LAYERS, LAYER = 8, 3, 1
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """What one compiled module is specialised for."""

    batch: int = 1
    seq: int | None = None
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float16


def reference(case: Case, arguments: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer does, by the eager ops: store, then attend."""
    query, key, value, cache, page_table, positions = arguments
    cache = torch.ops.llmir.append_kv(cache, key, value, page_table, positions, LAYER)
    scale = case.head_dim**-0.5
    return torch.ops.llmir.paged_attention(query, cache, page_table, positions, LAYER, scale, case.window, case.softcap)


def inputs(case: Case, starts: list[int], lengths: list[int], table: int = 0) -> list[torch.Tensor]:
    """A filled cache, and new tokens right-aligned as a step has them; every row has pages of its own."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * sum(starts))
    batch, seq = len(starts), case.seq or max(2, *lengths)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    entries = max(2, table, *(-(-end // PAGE_SIZE) for end in ends))
    pages = batch * entries + 1
    page_table = (torch.randperm(pages - 1, generator=generator) + 1).reshape(batch, entries).to(torch.int32)
    offsets = torch.arange(seq) - seq + torch.tensor(lengths)[:, None]
    positions = torch.where(offsets >= 0, offsets + torch.tensor(starts)[:, None], -1).to(torch.int32)
    query = torch.randn(batch, seq, case.kv_heads * case.group, case.head_dim, generator=generator)
    key, value = torch.randn(2, batch, seq, case.kv_heads, case.head_dim, generator=generator)
    shape = (pages, LAYERS, 2, case.kv_heads, PAGE_SIZE, case.head_dim)
    cache = torch.randn(shape, generator=generator).to(case.dtype)
    return [query, key, value, cache, page_table, positions]


def steps_of(case: Case, arguments: list[torch.Tensor]) -> tuple[list[tuple[LlmirCall, list[int]]], list[TensorType]]:
    """The two ops, and the types of their inputs: the table and the pages are dynamic, and what the case says so."""
    seq = () if case.seq else (1,)
    dynamic = (seq, seq, seq, (0,), (1,), seq)
    types = [type_of(tensor, *dimensions) for tensor, dimensions in zip(arguments, dynamic, strict=True)]
    query, key, _, cache, table, positions = types
    layer = ("layer", LAYER)
    append = LlmirCall("append_kv", (cache, key, key, table, positions), (cache,), (layer,))
    scores = (("scale", case.head_dim**-0.5), ("window", case.window), ("softcap", case.softcap))
    attend = LlmirCall("paged_attention", (query, cache, table, positions), (query, cache), (layer, *scores))
    return [(append, [3, 1, 2, 4, 5]), (attend, [0, 6, 4, 5])], types


@pytest.fixture(scope="module")
def compiled(run_on_lavapipe: Any) -> Any:
    """Compiled modules by case."""
    modules: dict[Case, Any] = {}

    def get(case: Case) -> Any:
        if case not in modules:
            steps, types = steps_of(case, inputs(case, [1] * case.batch, [case.seq or 5] * case.batch))
            modules[case] = run_on_lavapipe(steps, types, [7, 8])
        return modules[case]

    return get


def check(run: Any, case: Case, arguments: list[torch.Tensor]) -> None:
    expected_output, expected_cache = reference(case, arguments)
    output, cache = run(*arguments)
    np.testing.assert_allclose(output, expected_output.numpy(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(cache.astype(np.float32), expected_cache.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 33])
@pytest.mark.parametrize("start", [0, 7, 8, 9])
def test_a_prefill_at_awkward_lengths(compiled: Any, start: int, length: int) -> None:
    case = Case()
    check(compiled(case), case, inputs(case, [start], [length]))


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 9, 31, 33, 127, 300])
def test_a_decode_at_page_edges(compiled: Any, start: int) -> None:
    case = Case(seq=1)
    check(compiled(case), case, inputs(case, [start], [1]))


@pytest.mark.parametrize("seq", [None, 1])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_of_heads(compiled: Any, seq: int | None, head_dim: int, group: int) -> None:
    case = Case(seq=seq, head_dim=head_dim, group=group)
    check(compiled(case), case, inputs(case, [37], [seq or 11]))


@pytest.mark.parametrize("seq", [None, 1])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 256])
def test_sizes_of_heads(compiled: Any, seq: int | None, head_dim: int) -> None:
    case = Case(seq=seq, head_dim=head_dim, group=2)
    check(compiled(case), case, inputs(case, [21], [seq or 9]))


def test_a_prefill_of_rows_of_unequal_lengths_and_an_idle_one(compiled: Any) -> None:
    case = Case(batch=3)
    check(compiled(case), case, inputs(case, [5, 0, 16], [9, 0, 1]))


@pytest.mark.parametrize("batch", [2, 7, 33])
def test_a_decode_of_rows_of_unequal_lengths_and_idle_ones(compiled: Any, batch: int) -> None:
    case = Case(batch=batch, seq=1, group=8)
    lengths = [int(row % 3 != 1) for row in range(batch)]
    starts = [17 * row % 70 * length for row, length in enumerate(lengths)]
    check(compiled(case), case, inputs(case, starts, lengths, table=40))


def test_a_decode_of_so_many_rows_that_none_is_split(compiled: Any) -> None:
    case = Case(batch=128, seq=1, kv_heads=2, group=1, head_dim=16)
    check(compiled(case), case, inputs(case, [row % 20 for row in range(128)], [1] * 128))


@pytest.mark.parametrize("seq", [None, 1])
@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (8, 0.0), (0, 3.0), (5, 3.0)])
def test_window_and_softcap(compiled: Any, seq: int | None, window: int, softcap: float) -> None:
    case = Case(seq=seq, window=window, softcap=softcap)
    check(compiled(case), case, inputs(case, [39], [seq or 12]))


@pytest.mark.parametrize("seq", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_other_elements_is_another_specialisation(compiled: Any, seq: int | None, dtype: Any) -> None:
    case = Case(seq=seq, dtype=dtype)
    check(compiled(case), case, inputs(case, [13], [seq or 9]))


def test_a_static_chunk_is_another_specialisation(compiled: Any) -> None:
    case = Case(seq=64)
    check(compiled(case), case, inputs(case, [70], [64]))
    check(compiled(case), case, inputs(case, [0], [3]))


@pytest.mark.parametrize("seq", [None, 1])
@pytest.mark.parametrize("padding", [0, 5])
def test_padded_entries_never_reach_a_result(compiled: Any, seq: int | None, padding: int) -> None:
    case = Case(seq=seq)
    length = seq or 4
    query, key, value, cache, page_table, positions = inputs(case, [3], [length], table=9)
    page_table[0, 0] = 9
    expected, _ = compiled(case)(query, key, value, cache.clone(), page_table, positions)
    poisoned = cache.clone()
    poisoned[padding] = NAN
    poisoned[9, :, :, :, 3 + length :] = NAN  # what lies behind the last token in its own page
    longer = torch.tensor([[9, padding, padding, padding]], dtype=torch.int32)
    output, after = compiled(case)(query, key, value, poisoned.clone(), longer, positions)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-6)  # another number of splits
    untouched = np.ones(len(cache), dtype=bool)
    untouched[9] = False
    assert np.array_equal(after[untouched], poisoned.numpy()[untouched], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_numbers_are_rounded_as_torch_does(compiled: Any, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, seq=1)
    arguments = inputs(case, [9], [1])
    awkward = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3e-8, -0.0, 65504.0, 65519.0, float("inf"), NAN, -1e-41]
    arguments[1][0, 0, 0, : len(awkward)] = torch.tensor(awkward)
    _, expected = reference(case, arguments)
    _, cache = compiled(case)(*arguments)
    assert np.array_equal(cache.astype(np.float32), expected.float().numpy(), equal_nan=True)
