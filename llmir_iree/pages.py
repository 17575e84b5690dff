"""Pages of the cache: who holds which.

The cache is one tensor of pages, and a page holds `page_size` consecutive tokens of one sequence, all layers together.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmir_iree.params.errors import RequestError

# What the unused entries of a page table name. Any valid page would do for the modules, to which this one is a page
# like every other; kept out of the pool, it turns a stray access into garbage nobody reads.
PADDING_PAGE = 0


class PagePool:
    """Hands out pages 1 to `pages` - 1 of a cache; page 0 stays behind as `PADDING_PAGE`."""

    def __init__(self, pages: int, page_size: int) -> None:
        """Create a pool in which every page is free.

        Args:
            pages: pages of the cache, the padding page included.
            page_size: tokens a page holds.

        Raises:
            RequestError: no page would be left to hand out.
        """
        if pages < 2:
            raise RequestError(f"pages is {pages}; a cache needs at least 2, one of them for padding")
        self.pages = pages
        self.page_size = page_size
        self._held: set[int] = set()
        self._released: list[int] = []
        self._first_unused = PADDING_PAGE + 1

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.usable - len(self._held)

    @property
    def usable(self) -> int:
        """Pages that there are to hand out, held or free."""
        return self.pages - 1

    def pages_for(self, tokens: int) -> int:
        """Pages that this many tokens of one sequence occupy."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take pages out of the pool, all or none.

        Raises:
            RequestError: fewer than `count` are free.
        """
        if count > self.free:
            raise RequestError(
                f"the cache is full: {count} more pages of {self.page_size} tokens are needed, "
                f"{self.free} of {self.usable} are free"
            )
        # Used pages first: memory that was never touched costs nothing until it is.
        reused = [self._released.pop() for _ in range(min(count, len(self._released)))]
        first, self._first_unused = self._first_unused, self._first_unused + count - len(reused)
        pages = [*reused, *range(first, self._first_unused)]
        self._held.update(pages)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        for page in pages:
            if page not in self._held:
                raise ValueError(f"page {page} is not held by anyone")
            self._held.remove(page)
            self._released.append(page)


class Sequence:
    """The tokens of one text that the cache holds, in order, and the pages that hold them."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.tokens: list[int] = []
        self.pages: list[int] = []

    def __len__(self) -> int:
        """Tokens in the cache."""
        return len(self.tokens)

    def reserve(self, tokens: int) -> None:
        """Hold pages for a total of this many tokens, so that growing to it cannot fail.

        Raises:
            RequestError: the pool has too few; the sequence keeps what it had.
        """
        missing = self._pool.pages_for(tokens) - len(self.pages)
        if missing > 0:
            self.pages += self._pool.allocate(missing)

    def append(self, tokens: Iterable[int]) -> None:
        """Note tokens that were written to the cache, in pages that are reserved already."""
        self.tokens += tokens
        if self._pool.pages_for(len(self)) > len(self.pages):
            raise ValueError(f"{len(self)} tokens do not fit {len(self.pages)} pages of {self._pool.page_size}")

    def truncate(self, tokens: int) -> None:
        """Forget all but the first tokens, and give back the pages beyond them."""
        del self.tokens[tokens:]
        kept = self._pool.pages_for(len(self))
        self._pool.release(self.pages[kept:])
        del self.pages[kept:]

    def release(self) -> None:
        """Forget every token and give every page back."""
        self.truncate(0)
