from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir_iree.pages import PADDING_PAGE, PagePool, Sequence
from llmir_iree.params.errors import RequestError


def test_every_page_but_the_padding_page_is_handed_out_once() -> None:
    pool = PagePool(pages=6, page_size=4)
    assert (pool.free, pool.usable) == (5, 5)
    assert sorted(pool.allocate(3) + pool.allocate(2)) == [1, 2, 3, 4, 5]
    assert PADDING_PAGE == 0
    assert pool.free == 0


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(RequestError, match="pages is 1; a cache needs at least 2, one of them for padding"):
        PagePool(pages=1, page_size=4)


def test_all_or_none_are_allocated() -> None:
    pool = PagePool(pages=4, page_size=16)
    pool.allocate(1)
    with pytest.raises(RequestError, match="3 more pages of 16 tokens are needed, 2 of 3 are free"):
        pool.allocate(3)
    assert pool.free == 2


def test_pages_are_released_once() -> None:
    pool = PagePool(pages=4, page_size=4)
    pages = pool.allocate(2)
    pool.release(pages)
    for page in (pages[0], PADDING_PAGE, 3):
        with pytest.raises(ValueError, match=f"page {page} is not held by anyone"):
            pool.release([page])
    assert pool.free == 3


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_sequence_holds_the_pages_that_its_tokens_need(tokens: int, pages: int) -> None:
    sequence = Sequence(PagePool(pages=9, page_size=4))
    sequence.reserve(tokens)
    sequence.append(range(tokens))
    assert len(sequence) == tokens
    assert len(sequence.pages) == pages


def test_growing_keeps_the_pages_there_are() -> None:
    sequence = Sequence(PagePool(pages=9, page_size=4))
    sequence.reserve(5)
    first = list(sequence.pages)
    sequence.reserve(3)
    assert sequence.pages == first
    sequence.reserve(9)
    assert sequence.pages[:2] == first
    assert len(sequence.pages) == 3


def test_tokens_without_pages_are_refused() -> None:
    sequence = Sequence(PagePool(pages=9, page_size=4))
    sequence.reserve(4)
    with pytest.raises(ValueError, match="5 tokens do not fit 1 pages of 4"):
        sequence.append(range(5))


def test_truncating_keeps_the_beginning() -> None:
    pool = PagePool(pages=9, page_size=4)
    sequence = Sequence(pool)
    sequence.reserve(12)
    sequence.append(range(10))
    pages = list(sequence.pages)
    sequence.truncate(5)
    assert sequence.tokens == [0, 1, 2, 3, 4]
    assert sequence.pages == pages[:2]
    assert pool.free == 6
    sequence.release()
    assert (sequence.tokens, sequence.pages, pool.free) == ([], [], 8)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40))))
def test_no_page_is_held_twice(steps: list[tuple[int, int]]) -> None:
    pool = PagePool(pages=12, page_size=4)
    sequences = [Sequence(pool) for _ in range(4)]
    for index, tokens in steps:
        sequence = sequences[index]
        if tokens < len(sequence):
            sequence.truncate(tokens)
            continue
        try:
            sequence.reserve(tokens)
        except RequestError:
            continue
        sequence.append(range(len(sequence), tokens))
    held = [page for sequence in sequences for page in sequence.pages]
    assert len(set(held)) == len(held) == pool.usable - pool.free
    assert all(PADDING_PAGE < page < pool.pages for page in held)
