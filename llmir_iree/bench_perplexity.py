"""The perplexity of a text, in the manner of llama.cpp's own tool, so that formats and kernels can be held to it.

The text is cut into chunks of CHUNK_TOKENS, each read on an empty cache. Only the second half of a chunk counts, where
every prediction has at least half a chunk of context: the perplexity is e to the mean of -log p of those tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmir_iree.params.errors import RequestError

if TYPE_CHECKING:  # Importing the engines loads the runtime.
    from llmir_iree.bench_engines import Engine
    from llmir_iree.tokenizer import Tokenizer

CHUNK_TOKENS = 512

TOLERANCE = 0.005
"""How far two engines may be apart on the same weights, as a share."""

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Perplexity:
    """What engines make of the same tokens.

    Attributes:
        tokens: of the text, those that count and those that are context only.
        values: perplexity by engine.
    """

    tokens: int
    values: dict[str, float]

    @property
    def distance(self) -> float:
        """How far the highest is above the lowest, as a share."""
        return max(self.values.values()) / min(self.values.values()) - 1


def python_help_text() -> str:
    """The help texts that every CPython brings along: prose, code and grammar, the same within a minor version."""
    return "\n".join(topics[name] for name in sorted(topics))


def cut_chunks(tokenizer: Tokenizer, text: str, tokens: int, bos: int | None, size: int = CHUNK_TOKENS) -> IntArray:
    """The first tokens of a text as i32 [chunks, size], as many whole chunks as `tokens` has.

    Where the tokenizer begins a text with the token `bos`, that takes the place of every chunk's first token.

    Raises:
        RequestError: fewer than one chunk was asked for, or the text has too few tokens.
    """
    ids = np.array(tokenizer.encode(text), np.int32)
    chunks = tokens // size
    if chunks < 1 or chunks * size > len(ids):
        raise RequestError(f"perplexity of {tokens} tokens: the text has {len(ids)}, and a chunk takes {size}")
    cut = ids[: chunks * size].reshape(chunks, size).copy()
    if bos is not None and tokenizer.encode("")[:1] == [bos]:
        cut[:, 0] = bos
    return cut


def measure_perplexity(
    engines: Sequence[Engine], chunks: IntArray, batch: int, note: Callable[[str], None] = lambda _: None
) -> Perplexity:
    """Run every engine over all chunks, up to `batch` of them side by side.

    Args:
        engines: who reads the text.
        chunks: i32 [chunks, size].
        batch: a batch size that all engines have; a last group that is smaller is filled up with its first chunk.
        note: takes a line about what is being done.
    """
    values = {}
    for engine in engines:
        note(f"perplexity of {chunks.size} tokens: {engine.name}")
        losses: list[npt.NDArray[np.float64]] = []
        for first in range(0, len(chunks), batch):
            group = chunks[first : first + batch]
            filled = np.concatenate([group, np.repeat(group[:1], batch - len(group), axis=0)])
            losses.append(engine.losses(filled, chunks.shape[1] // 2)[: len(group)])
        values[engine.name] = float(np.exp(np.concatenate(losses).mean()))
    return Perplexity(int(chunks.size), values)
