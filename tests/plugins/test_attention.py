"""`append_kv` and `paged_attention`, portable and with kernels, compiled, against the ops' eager definitions."""

from typing import Any

import numpy as np
import pytest
import torch

import llmir_iree.export.ops  # noqa: F401  registers the ops

PAGE_SIZE, LAYERS, KV_HEADS, HEADS, HEAD_DIM = 8, 3, 2, 6, 16
LAYER = 1
NAN = float("nan")


class AppendAndAttend(torch.nn.Module):
    """What a layer does: store, then attend."""

    def __init__(self, window: int = 0, softcap: float = 0.0) -> None:
        super().__init__()
        self.window, self.softcap = window, softcap

    def forward(self, query: Any, key: Any, value: Any, cache: Any, page_table: Any, positions: Any) -> Any:
        cache = torch.ops.llmir.append_kv(cache, key, value, page_table, positions, LAYER)
        return torch.ops.llmir.paged_attention(
            query, cache, page_table, positions, LAYER, HEAD_DIM**-0.5, self.window, self.softcap
        )


def inputs(starts: list[int], lengths: list[int], pages: int = 16, dtype: Any = torch.float16) -> list[torch.Tensor]:
    """A filled cache, and new tokens right-aligned as the step has them; every row has pages of its own."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * sum(starts))
    batch, seq = len(starts), max(2, *lengths)
    entries = max(2, *(-(-(start + length) // PAGE_SIZE) for start, length in zip(starts, lengths, strict=True)))
    order = torch.randperm(pages - 1, generator=generator) + 1
    page_table = order[: batch * entries].reshape(batch, entries).to(torch.int32)
    offsets = torch.arange(seq) - seq + torch.tensor(lengths)[:, None]
    positions = torch.where(offsets >= 0, offsets + torch.tensor(starts)[:, None], -1).to(torch.int32)
    query = torch.randn(batch, seq, HEADS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, batch, seq, KV_HEADS, HEAD_DIM, generator=generator)
    cache = torch.randn(pages, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM, generator=generator).to(dtype)
    return [query, key, value, cache, page_table, positions]


@pytest.fixture(scope="module", params=["best", "portable"])
def implementations(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compiled(compile_for_cpu: Any, implementations: str) -> Any:
    """Compiled modules by batch size and options; sequence, table and pages are dynamic."""
    modules: dict[Any, Any] = {}

    def get(batch: int, window: int = 0, softcap: float = 0.0, dtype: Any = torch.float16) -> Any:
        key = (batch, window, softcap, dtype)
        if key not in modules:
            seq, table, pages = (torch.export.Dim(name, min=2, max=4096) for name in ("seq", "table", "pages"))
            rows = {1: seq}
            modules[key] = compile_for_cpu(
                AppendAndAttend(window, softcap),
                *inputs([0] * batch, [5] * batch, dtype=dtype),
                dynamic_shapes=(rows, rows, rows, {0: pages}, {1: table}, rows),
                implementations=implementations,
            )
        return modules[key]

    return get


def check(run: Any, arguments: list[torch.Tensor], window: int = 0, softcap: float = 0.0) -> None:
    expected_output, expected_cache = AppendAndAttend(window, softcap)(*arguments)
    output, cache = run(*(argument.clone() for argument in arguments))
    np.testing.assert_allclose(output, expected_output.numpy(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(cache.astype(np.float32), expected_cache.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 33])
@pytest.mark.parametrize("start", [0, 7, 8, 9])
def test_one_row_at_awkward_lengths(compiled: Any, start: int, length: int) -> None:
    check(compiled(1), inputs([start], [length]))


def test_rows_of_unequal_lengths_and_an_idle_one(compiled: Any) -> None:
    check(compiled(3), inputs([5, 0, 16], [9, 0, 1], pages=32))


@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (8, 0.0), (0, 3.0), (5, 3.0)])
def test_window_and_softcap(compiled: Any, window: int, softcap: float) -> None:
    check(compiled(1, window, softcap), inputs([9], [12]), window, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_other_elements_is_another_specialisation(compiled: Any, dtype: torch.dtype) -> None:
    check(compiled(1, dtype=dtype), inputs([3], [9], dtype=dtype))


def test_a_large_cache_with_a_short_table(compiled: Any) -> None:
    check(compiled(1), inputs([3], [4], pages=301))


def test_static_sizes_are_another_specialisation(compile_for_cpu: Any, implementations: str) -> None:
    arguments = inputs([3], [9])
    check(compile_for_cpu(AppendAndAttend(), *arguments, implementations=implementations), arguments)


@pytest.mark.parametrize("padding", [0, 5])
def test_padded_entries_never_reach_a_result(compiled: Any, padding: int) -> None:
    query, key, value, cache, page_table, positions = inputs([3], [4])
    page_table[0, 0] = 9
    expected, _ = compiled(1)(query, key, value, cache.clone(), page_table, positions)
    poisoned = cache.clone()
    poisoned[padding] = NAN
    poisoned[9, :, :, :, 7:] = NAN  # what lies behind the last token in its own page
    longer = torch.tensor([[9, padding, padding, padding]], dtype=torch.int32)
    output, after = compiled(1)(query, key, value, poisoned.clone(), longer, positions)
    np.testing.assert_array_equal(output, expected)
    untouched = np.ones(len(cache), dtype=bool)
    untouched[9] = False
    assert np.array_equal(after[untouched], poisoned.numpy()[untouched], equal_nan=True)
