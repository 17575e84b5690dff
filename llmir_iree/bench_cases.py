"""What is timed: tests in llama-bench's manner, and the work that one takes.

"pp<n>" runs prompts of n tokens on an empty cache, "tg<n>" runs n single tokens after a first one that is not timed.
"tg<n>@<c>" begins behind a context of c tokens, whose cache is random: nothing is computed for it. "x<b>" at the end
asks for a batch of its own, b sequences side by side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmir_iree.bundle import Bundle
from llmir_iree.params.errors import RequestError

if TYPE_CHECKING:
    from llmir_iree.plugins.kernels.peaks import Multiplied

Kind = Literal["pp", "tg"]

_TEST = re.compile(r"(pp|tg)([1-9]\d{0,6})(?:@([1-9]\d{0,6}))?(?:x([1-9]\d{0,3}))?")


@dataclass(frozen=True)
class TimedTest:
    """A test as it is asked for: its kind, new tokens, tokens before them, and a batch size of its own."""

    kind: Kind
    tokens: int
    context: int = 0
    batch: int | None = None


@dataclass(frozen=True)
class Case:
    """A test at a batch size: "pp" or "tg", tokens a sequence, sequences side by side, tokens before them."""

    kind: Kind
    tokens: int
    batch: int
    context: int = 0

    @property
    def test(self) -> str:
        """The test's name."""
        return f"{self.kind}{self.tokens}" + (f"@{self.context}" if self.context else "")

    @property
    def new_tokens(self) -> int:
        """Tokens that a sequence is given, the first of a "tg" included."""
        return self.tokens + (self.kind == "tg")

    @property
    def length(self) -> int:
        """Tokens that a sequence holds in the end."""
        return self.context + self.new_tokens

    @property
    def timed_tokens(self) -> int:
        """Tokens of all sequences that the time is divided by."""
        return self.tokens * self.batch


def parse_test(name: str) -> TimedTest:
    """The test of a name: "tg32@2048x4" is TimedTest("tg", 32, 2048, 4).

    Raises:
        RequestError: not a test's name.
    """
    match = _TEST.fullmatch(name)
    if match is None or (match[1] == "pp" and match[3]):
        raise RequestError(
            f"unknown test {name!r}; a test is pp<n> (a prompt), tg<n> (decoding) or tg<n>@<c> (behind c tokens), such "
            "as pp128; x<b> behind it asks for a batch of its own"
        )
    kind: Kind = "pp" if match[1] == "pp" else "tg"
    return TimedTest(kind, int(match[2]), int(match[3] or 0), int(match[4]) if match[4] else None)


@dataclass(frozen=True)
class Work:
    """What the steps of a bundle have to read and to multiply, whoever implements them.

    Attributes:
        weight_bytes: of the weights that one step reads.
        cache_token_bytes: that one token takes in the cache.
        token_macs: products of the linear layers for every token.
        head_macs: those of the output head, which only the last token of a prompt meets.
        multiplied: "bytes" if all weights are quantised, "floats" if none is, None if there are both.
    """

    weight_bytes: int
    cache_token_bytes: int
    token_macs: int
    head_macs: int
    multiplied: Multiplied | None

    @classmethod
    def of(cls, bundle: Bundle) -> Work:
        """Read it from the manifest and, for the products, from the matmuls of the portable prefill.

        Raises:
            CompileError: the portable module holds what this version does not know.
        """
        from iree.compiler import ir

        from llmir_iree.params.formats import FORMATS
        from llmir_iree.plugins.calls import find_calls

        manifest = bundle.manifest
        batch = manifest.batch_sizes("prefill")[0]
        token_macs = head_macs = 0
        multiplied: set[Multiplied] = set()
        with ir.Context(), ir.Location.unknown():
            module = ir.Module.parse(bundle.path(manifest.portable["prefill"].file).read_text(encoding="utf-8"))
            for site in find_calls(module):
                x = site.call.operands[0]
                if site.call.op != "quantized_matmul" or x.shape[0] != batch:
                    continue
                macs = int(site.call.constant("out_features")) * (x.shape[-1] or 0)
                if x.shape[1] is None:
                    token_macs += macs
                else:
                    head_macs += macs
                is_quantized = FORMATS[str(site.call.constant("format"))].is_quantized
                multiplied.add("bytes" if is_quantized else "floats")
        cache = manifest.cache
        return cls(
            weight_bytes=manifest.parameters.decode_bytes,
            cache_token_bytes=cache.page_bytes // cache.page_size,
            token_macs=token_macs,
            head_macs=head_macs,
            multiplied=multiplied.pop() if len(multiplied) == 1 else None,
        )

    def read_bytes(self, case: Case) -> int:
        """Bytes that a "tg" has to read: the weights once a step, each sequence's cache as long as it is by then."""
        contexts = sum(range(case.context + 2, case.length + 1))
        return case.tokens * self.weight_bytes + case.batch * contexts * self.cache_token_bytes

    def macs(self, case: Case) -> int:
        """Products of the linear layers in the timed part of a case; attention's are not counted."""
        heads = 1 if case.kind == "pp" else case.tokens
        return case.batch * (case.tokens * self.token_macs + heads * self.head_macs)
