from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import pytest

from llmir_iree import session as session_module
from llmir_iree.bundle import Bundle, CacheDtype, file_sha256
from llmir_iree.pages import PADDING_PAGE, Sequence
from llmir_iree.params.errors import BundleError, LlmirError, RequestError, TargetError
from llmir_iree.session import MemoryPlan, Row, Session


@pytest.fixture
def session(tiny: Any) -> Session:
    return Session(Bundle.open(tiny.folder))


def i32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def held(cache: np.ndarray, pages: list[int], count: int) -> list[int]:
    """Tokens that these pages hold, as the model writes them: keys and values start with the token."""
    keys, values = (cache[pages, 0, kv, 0, :, 0].reshape(-1)[:count].astype(int).tolist() for kv in (0, 1))
    assert keys == values
    return keys


# The low-level call


def test_run_writes_new_tokens_where_the_table_says(session: Session, tiny: Any) -> None:
    tokens = [5, 9, 4, 8, 7]
    result = session.run("prefill", 1, i32([11, 11, *tokens]), i32(0), i32(5), i32([3, 1, 0]))
    np.testing.assert_array_equal(result.logits(), [tiny.logits(tokens)])
    assert result.next_token().tolist() == tiny.greedy(tokens, 1)
    cache = session.read_cache()
    assert held(cache, [3, 1], 5) == tokens
    untouched = np.delete(cache, [3, 1], axis=0)
    assert not untouched.any(), "padding columns or table entries were written"


def test_run_reads_only_what_a_row_holds(session: Session, tiny: Any) -> None:
    """Rubbish in every page, the padding page too, must not reach a result."""
    session.write_cache(np.full_like(session.read_cache(), np.nan))
    prefilled = session.run("prefill", 1, i32([6, 2, 9]), i32(0), i32(3), i32([2, 0]))
    np.testing.assert_array_equal(prefilled.logits()[0], tiny.logits([6, 2, 9]))
    decoded = session.run("decode", 1, i32([4]), i32(3), i32(1), i32([2, 0]))
    np.testing.assert_array_equal(decoded.logits()[0], tiny.logits([6, 2, 9, 4]))


def test_the_cache_is_updated_in_place(session: Session) -> None:
    before = session._cache.get_buffer().__iree_vm_ref__
    session.run("prefill", 1, i32([6, 2]), i32(0), i32(2), i32([2, 0]))
    session.run("decode", 1, i32([4]), i32(2), i32(1), i32([2, 0]))
    assert session._cache.get_buffer().__iree_vm_ref__ == before


def test_reading_the_cache_is_never_stale(session: Session) -> None:
    first = session.read_cache()
    session.run("prefill", 1, i32([6, 2]), i32(0), i32(2), i32([2, 0]))
    second = session.read_cache()
    session.run("decode", 1, i32([4]), i32(2), i32(1), i32([2, 0]))
    assert not first.any()
    assert held(second, [2], 4) == [6, 2, 0, 0]
    assert held(session.read_cache(), [2], 4) == [6, 2, 4, 0]


def test_a_written_cache_is_what_the_modules_read(session: Session, tiny: Any) -> None:
    session.run("prefill", 1, i32([6, 2, 9]), i32(0), i32(3), i32([2, 0]))
    cache = session.read_cache()
    cache[[5, 2]] = cache[[2, 5]]
    session.write_cache(cache)
    result = session.run("decode", 1, i32([4]), i32(3), i32(1), i32([5, 0]))
    assert result.next_token().tolist() == tiny.greedy([6, 2, 9, 4], 1)
    with pytest.raises(RequestError, match=r"the cache is f32 \(17, 1, 2, 1, 4, 2\), got float64 \(17, "):
        session.write_cache(cache.astype(np.float64))


def test_idle_rows_write_nothing(session: Session, tiny: Any) -> None:
    result = session.run("decode", 4, i32([9], [5], [9], [9]), i32(0, 0, 0, 0), i32(0, 1, 0, 0), i32(*[[3, 3]] * 4))
    assert result.next_token()[1] == tiny.greedy([5], 1)[0]
    cache = session.read_cache()
    assert held(cache, [3], 4) == [5, 0, 0, 0]
    assert not np.delete(cache, 3, axis=0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("prefill", 2, i32([1, 2]), i32(0), i32(1), i32([1, 0])),
            "no prefill for batch size 2; it was exported for 1",
        ),
        (("prefill", 1, i32([1]), i32(0), i32(1), i32([1, 0])), "tokens has 1 columns, expected at least 2"),
        (("decode", 1, i32([1, 2]), i32(0), i32(1), i32([1, 0])), "tokens has 2 columns, expected 1"),
        (("decode", 1, i32([1]), i32(0, 0), i32(1), i32([1, 0])), r"starts is int32 \(2,\), expected int32 \(1,\)"),
        (("decode", 1, np.array([[1]]), i32(0), i32(1), i32([1, 0])), r"tokens is int64 \(1, 1\), expected int32"),
        (("decode", 1, i32([1]), i32(0), i32(1), i32([1])), "page_table has 1 entries a row, expected at least 2"),
        (("decode", 1, i32([1]), i32(0), i32(2), i32([1, 0])), r"lengths are \[2\], expected 0 to 1"),
        (("decode", 1, i32([1]), i32(8), i32(1), i32([1, 0])), r"rows end at \[9\], the page table covers 8 tokens"),
        (("decode", 1, i32([1]), i32(0), i32(1), i32([17, 0])), "the page table names pages outside 0 to 16"),
        (("decode", 1, i32([34]), i32(0), i32(1), i32([1, 0])), "tokens outside 0 to 33"),
    ],
)
def test_run_refuses_what_would_reach_outside(session: Session, arguments: Any, message: str) -> None:
    with pytest.raises(LlmirError, match=message):
        session.run(*arguments)


# Rows and sequences


def test_prefill_then_decode_follows_the_model(session: Session, tiny: Any) -> None:
    prompt = [0, 9, 4, 8, 7, 30, 12]
    expected = tiny.greedy(prompt, 20)
    sequence = Sequence(session.pool)
    (result,) = session.prefill([Row(sequence, tuple(prompt))])
    tokens = [result.next_token]
    while len(tokens) < 20:
        (result,) = session.decode([Row(sequence, (tokens[-1],))])
        tokens.append(result.next_token)
    assert tokens == expected
    assert sequence.tokens == [*prompt, *expected[:-1]]
    assert held(session.read_cache(), sequence.pages, len(sequence)) == sequence.tokens


def test_prefill_goes_on_from_what_is_cached(session: Session, tiny: Any) -> None:
    prompt = (0, 9, 4, 8, 7, 30, 12)
    sequence = Sequence(session.pool)
    session.prefill([Row(sequence, prompt[:3])])
    (result,) = session.prefill([Row(sequence, prompt[3:])])
    np.testing.assert_array_equal(result.logits(), tiny.logits(prompt))


@pytest.mark.parametrize(("rows", "calls"), [(1, [1]), (2, [4]), (4, [4]), (5, [4, 1]), (7, [4, 4])])
def test_decode_picks_the_smallest_batch_that_fits(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, rows: int, calls: list[int]
) -> None:
    session = Session(Bundle.open(tiny.folder), pages=30)
    batch_sizes = []
    run: Callable[..., Any] = session.run
    monkeypatch.setattr(session, "run", lambda phase, size, *rest: batch_sizes.append(size) or run(phase, size, *rest))
    prompts = [tuple(range(4, 6 + row)) for row in range(rows)]  # Of different lengths, so of different pages.
    sequences = [Sequence(session.pool) for _ in prompts]
    session.prefill([Row(sequence, prompt) for sequence, prompt in zip(sequences, prompts, strict=True)])
    batch_sizes.clear()
    results = session.decode([Row(sequence, (20,)) for sequence in sequences])
    assert batch_sizes == calls
    assert [result.next_token for result in results] == [tiny.greedy([*prompt, 20], 1)[0] for prompt in prompts]
    for result, prompt in zip(results, prompts, strict=True):
        np.testing.assert_array_equal(result.logits(), tiny.logits([*prompt, 20]))


def test_the_page_table_is_as_wide_as_the_tokens_need(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pages are reserved."""
    widths = []
    run: Callable[..., Any] = session.run
    monkeypatch.setattr(session, "run", lambda *inputs: widths.append(inputs[-1].shape) or run(*inputs))
    sequence = Sequence(session.pool)
    sequence.reserve(60)
    session.prefill([Row(sequence, tuple(range(4, 11)))])
    session.decode([Row(sequence, (4,))])
    session.decode([Row(sequence, (4,))])
    assert widths == [(1, 2), (1, 2), (1, 3)]


@pytest.mark.parametrize("length", [1, 3, 4, 8])
def test_a_long_prompt_runs_in_pieces(
    session: Session, tiny: Any, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(session_module, "PREFILL_TOKENS", 3)
    widths = []
    run: Callable[..., Any] = session.run
    monkeypatch.setattr(session, "run", lambda *inputs: widths.append(inputs[2].shape[1]) or run(*inputs))
    prompt = tuple(range(4, 4 + length))
    (result,) = session.prefill([Row(Sequence(session.pool), prompt)])
    np.testing.assert_array_equal(result.logits(), tiny.logits(prompt))
    assert len(widths) == -(-length // 3)
    assert max(widths) <= 3


def test_logits_are_read_only_when_asked_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    to_host = session_module.to_host
    monkeypatch.setattr(session_module, "to_host", lambda *a: shapes.append(list(a[2].shape)) or to_host(*a))
    sequence = Sequence(session.pool)
    (result,) = session.prefill([Row(sequence, (4, 5))])
    assert result.next_token == result.next_token
    assert shapes == [[1]]
    result.logits()
    result.logits()
    assert shapes == [[1], [1, 34]]


def test_results_outlive_the_next_step(session: Session, tiny: Any) -> None:
    sequence = Sequence(session.pool)
    (first,) = session.prefill([Row(sequence, (4, 5))])
    session.decode([Row(sequence, (6,))])
    np.testing.assert_array_equal(first.logits(), tiny.logits([4, 5]))


def test_a_full_pool_is_refused_with_the_numbers(tiny: Any) -> None:
    session = Session(Bundle.open(tiny.folder), pages=3)
    with pytest.raises(RequestError, match="3 more pages of 4 tokens are needed, 2 of 2 are free"):
        session.prefill([Row(Sequence(session.pool), tuple(range(9)))])
    assert PADDING_PAGE not in session.pool.allocate(2)


def test_a_sequence_does_not_outgrow_the_model(tiny: Any) -> None:
    session = Session(Bundle.open(tiny.folder), max_seq_len=8)
    assert session.pool.usable == 2
    with pytest.raises(RequestError, match="9 tokens do not fit a sequence; max_seq_len is 8"):
        session.prefill([Row(Sequence(session.pool), tuple(range(9)))])
    with pytest.raises(RequestError, match="a step needs at least one new token"):
        Row(Sequence(session.pool), ())


# Loading


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_a_cache_of_any_dtype_begins_with_zeros_and_can_be_written(tiny_copy: Any, dtype: CacheDtype) -> None:
    edit_manifest(tiny_copy.folder, lambda data: data["cache"].update(dtype=dtype))
    session = Session(Bundle.open(tiny_copy.folder))
    before = session.read_cache()
    assert before.dtype == session_module.CACHE_DTYPES[dtype]
    assert not before.any()
    values = np.arange(before.size).reshape(before.shape).astype(before.dtype)
    session.write_cache(values)
    np.testing.assert_array_equal(session.read_cache(), values)


def test_a_changed_module_is_refused(tiny_copy: Any) -> None:
    module = tiny_copy.folder / "cpu" / "decode.vmfb"
    module.write_bytes(module.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"decode\.vmfb: not the module that this bundle's manifest describes"):
        Session(Bundle.open(tiny_copy.folder))


def test_a_foreign_module_is_refused(tiny_copy: Any) -> None:
    """Even one whose hash is right: it lacks the functions."""
    shared = (tiny_copy.folder / "cpu" / "prefill.vmfb").read_bytes()
    (tiny_copy.folder / "cpu" / "decode.vmfb").write_bytes(shared)

    def adopt(data: dict[str, Any]) -> None:
        modules = data["targets"]["cpu"]["modules"]
        modules["decode"]["sha256"] = modules["prefill"]["sha256"]

    edit_manifest(tiny_copy.folder, adopt)
    with pytest.raises(BundleError, match=r"decode\.vmfb: no function decode_bs1; it has prefill_bs1"):
        Session(Bundle.open(tiny_copy.folder))


def test_what_is_no_module_is_refused(tiny_copy: Any) -> None:
    (tiny_copy.folder / "cpu" / "decode.vmfb").write_bytes(b"nonsense" * 512)
    digest = file_sha256(tiny_copy.folder / "cpu" / "decode.vmfb")
    edit_manifest(tiny_copy.folder, lambda data: data["targets"]["cpu"]["modules"]["decode"].update(sha256=digest))
    with pytest.raises(BundleError, match=r"decode\.vmfb: not a compiled module"):
        Session(Bundle.open(tiny_copy.folder))


def test_a_missing_parameter_is_refused(tiny_copy: Any) -> None:
    archive = tiny_copy.folder / "params.irpa"
    index = rt.ParameterIndex()
    index.add_buffer("other", np.zeros(1, np.float32))
    index.create_archive_file(str(archive))
    edit_manifest(tiny_copy.folder, lambda data: data["parameters"].update(nbytes=archive.stat().st_size))
    with pytest.raises(TargetError, match=r"the modules for cpu do not load on local-task: .*table"):
        Session(Bundle.open(tiny_copy.folder))


def test_a_missing_driver_is_refused(tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"device 'metal9': this runtime has no driver 'metal9'; it has .*local-task"):
        Session(Bundle.open(tiny.folder), device="metal9")


def test_an_unknown_target_is_refused(tiny: Any) -> None:
    with pytest.raises(BundleError, match="not compiled for gpu; compiled targets: cpu"):
        Session(Bundle.open(tiny.folder), target="gpu")


@pytest.mark.parametrize("max_seq_len", [1, 65])
def test_max_seq_len_out_of_range_is_refused(tiny: Any, max_seq_len: int) -> None:
    with pytest.raises(RequestError, match=f"max_seq_len is {max_seq_len}; this bundle takes 2 to 64"):
        Session(Bundle.open(tiny.folder), max_seq_len=max_seq_len)


def test_too_little_memory_is_refused_before_loading(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "available_memory", lambda: 100 << 20)
    monkeypatch.setattr(session_module, "open_device", lambda uri: pytest.fail("loaded first"))
    with pytest.raises(RequestError, match=r"not enough memory: .*cache 0 MiB.*100 MiB available; use fewer pages"):
        Session(Bundle.open(tiny.folder))


def test_the_memory_plan_counts_weights_cache_and_workspace() -> None:
    plan = MemoryPlan(weights=700, cache=200, workspace=100)
    plan.check(1000)
    with pytest.raises(RequestError, match="not enough memory"):
        plan.check(999)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to tell anonymous memory from mapped")
def test_an_unused_cache_takes_no_memory(tiny: Any) -> None:
    """A cache of 1 GiB, of which one page is used, in a process of its own."""
    program = f"""
from llmir_iree.bundle import Bundle
from llmir_iree.machine import anonymous_memory
from llmir_iree.pages import Sequence
from llmir_iree.session import Row, Session
session = Session(Bundle.open({str(tiny.folder)!r}), pages=(1 << 30) // 64)
(result,) = session.prefill([Row(Sequence(session.pool), (4, 5, 6))])
print(result.next_token, anonymous_memory() >> 20)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    token, mebibytes = map(int, output.split())
    assert token == tiny.greedy([4, 5, 6], 1)[0]
    assert mebibytes < 200
