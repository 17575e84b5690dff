"""Generation in layers: one step (`Session`), a stream of steps, one call.

>>> llm = LLM("bundles/smollm2")
>>> llm.generate("The sky is", SamplingParams(max_tokens=20)).text
>>> for token in llm.stream("The sky is"):
...     print(token.text, end="")
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

from llmir_iree.bundle import TOKENIZER_FOLDER, Bundle
from llmir_iree.pages import Sequence as CachedSequence
from llmir_iree.params.errors import BundleError, RequestError
from llmir_iree.sampling import Sampler, SamplingParams
from llmir_iree.session import Row, RowResult, Session
from llmir_iree.stop_text import StopText
from llmir_iree.tokenizer import Message, TextStream, Tokenizer
from llmir_iree.zones import frame_mark, message, zone

FinishReason = Literal["stop", "length"]

_DEFAULT = SamplingParams()


@dataclass(frozen=True)
class Usage:
    """Counts and times of one completion so far.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that the cache held already, so that they cost nothing.
        completion_tokens: tokens generated.
        ttft_s: seconds from the request to the first token; waiting for other prompts of a list counts.
        prefill_s: seconds of the prefill.
        decode_s: seconds of the decode steps, choosing and decoding tokens included, whoever consumes them excluded.
        decode_bytes: bytes that these steps read: the weights once a step, whatever ran beside, and this text's cache.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_bytes: int = 0

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens a second, those in the cache not counted; None before the prefill."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else None

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens a second after the first one, which the prefill gives; None before there is a second."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s else None

    @property
    def decode_bytes_s(self) -> float | None:
        """Bytes a second that the decode steps read; None before the first step."""
        return self.decode_bytes / self.decode_s if self.decode_s else None


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        index: which prompt of the list it belongs to.
        token: its number.
        text: what can be shown now: "" while a character is incomplete or the text may turn out to be a stop string.
        usage: running counts.
        finish_reason: on the last token of a prompt, "stop" (end of sequence, stop string) or "length" (`max_tokens`,
            `max_seq_len`); None before.
    """

    index: int
    token: int
    text: str
    usage: Usage
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """The whole answer to one prompt; `tokens` include what ended it, `text` does not."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage


class LLM:
    """A bundle, ready to answer.

    Not for several threads at once; several streams may be read in turns.

    Attributes:
        session: the loaded modules and their cache.
        tokenizer: the bundle's tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: str | None = None,
        device: str | None = None,
        pages: int | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        """Load a bundle.

        Args:
            path: a bundle's folder, or one of its compiled modules, which then names the target.
            target: name of a compiled target; may be left out if there is one only.
            device: an IREE device URI; the target's driver if left out.
            pages: pages of the cache; enough for one sequence of `max_seq_len` if left out. A list of prompts shares
                them, and waits for one another where they do not suffice.
            max_seq_len: most tokens of prompt and completion together; the model's if left out.

        Raises:
            BundleError, TargetError, RequestError: as `Session` does.
        """
        bundle, implied = Bundle.containing(path)
        if target is not None and implied is not None and target != implied:
            raise BundleError(f"{path} is compiled for {implied}, not for {target}")
        self.tokenizer = Tokenizer.load(bundle.path(TOKENIZER_FOLDER))
        self.session = Session(bundle, target or implied, device, pages, max_seq_len)
        self._eos_token_ids = self.tokenizer.eos_token_ids.union(bundle.manifest.model.eos_token_ids)
        self._max_batch = bundle.manifest.batch_sizes("decode")[-1]
        self._conversation: CachedSequence | None = None

    @overload
    def generate(self, prompt: str, params: SamplingParams = ...) -> Completion: ...
    @overload
    def generate(self, prompt: list[str], params: SamplingParams = ...) -> list[Completion]: ...
    def generate(self, prompt: str | list[str], params: SamplingParams = _DEFAULT) -> Completion | list[Completion]:
        """Complete a prompt, or a list of prompts, whose decode steps then run as batches.

        Raises:
            RequestError: a prompt that is empty, or does not fit `max_seq_len` or the cache.
        """
        if isinstance(prompt, str):
            return _collect(self.stream(prompt, params), 1)[0]
        runs = [self._run(index, self.tokenizer.encode(text), params) for index, text in enumerate(prompt)]
        return _collect(self._serve(runs), len(runs))

    def stream(self, prompt: str, params: SamplingParams = _DEFAULT) -> Iterator[Token]:
        """Complete a prompt token by token; as `generate`."""
        return self._serve([self._run(0, self.tokenizer.encode(prompt), params)])

    def chat(self, messages: Sequence[Message], params: SamplingParams = _DEFAULT) -> Completion:
        """Answer a conversation.

        The cache keeps the conversation: of the next one, only what follows the longest common beginning is prefilled.

        Args:
            messages: mappings with "role" and "content", the last one usually of the user.
            params: how to sample the answer, and when it ends.

        Raises:
            RequestError: as `generate` does; or the model has no chat template, or the template refuses the messages.
        """
        return _collect(self.stream_chat(messages, params), 1)[0]

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams = _DEFAULT) -> Iterator[Token]:
        """Answer a conversation token by token; as `chat`."""
        prompt = self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special=False)
        return self._serve([self._run(0, prompt, params, is_chat=True)])

    def reset(self) -> None:
        """Forget the conversation that the cache keeps."""
        if self._conversation is not None:
            self._conversation.release()
            self._conversation = None

    def _run(self, index: int, prompt: list[int], params: SamplingParams, is_chat: bool = False) -> _Run:
        """A checked request."""
        most = self.session.max_seq_len
        if not prompt:
            raise RequestError("the prompt is empty")
        if len(prompt) >= most:
            raise RequestError(f"the prompt has {len(prompt)} tokens; max_seq_len is {most}, the answer's included")
        return _Run(index, prompt, params, most, self._eos_token_ids, self.tokenizer.stream(), is_chat)

    def _serve(self, runs: list[_Run]) -> Iterator[Token]:
        """The central loop: let prompts in while there is room, then advance all that run by one token.

        Requests overlap, and consumers take turns, so that none can be a zone: messages tell where each begins and
        ends.
        """
        waiting, running = deque(runs), list[_Run]()
        try:
            while waiting or running:
                while waiting and self._admit(waiting[0], running):
                    run = waiting.popleft()
                    running.append(run)
                    message(f"request {run.index} begins: {len(run.prompt)} tokens in the prompt")
                    with zone("prefill", f"request {run.index}"):
                        tokens = self._advance(self.session.prefill, [run])
                    yield from tokens
                with zone("step"):
                    tokens = self._advance(self.session.decode, [run for run in running if not run.is_finished])
                frame_mark("step")
                yield from tokens
                running = [run for run in running if not run.is_finished]
        finally:  # Also when the consumer stops early.
            for run in runs:
                self._close(run)

    def _admit(self, run: _Run, running: list[_Run]) -> bool:
        """Let a prompt in with all the pages it can come to need, so that it never stops half-way; or have it wait.

        Raises:
            RequestError: there are too few pages, and nothing to wait for.
        """
        if len(running) == self._max_batch:
            return False
        try:
            self._open(run)
        except RequestError:
            if running:
                return False
            # The conversation is kept to save time only: its pages are the first to go.
            self.reset()
            self._open(run)
        return True

    def _open(self, run: _Run) -> None:
        sequence = CachedSequence(self.session.pool)
        if run.is_chat and self._conversation is not None:
            sequence, self._conversation = self._conversation, None
            sequence.truncate(_common_prefix(sequence.tokens, run.prompt[:-1]))  # The last token gives the logits.
        try:
            sequence.reserve(run.most_tokens - 1)  # The last token is never run.
        except RequestError:
            self._conversation = sequence if run.is_chat else self._conversation
            raise
        run.sequence = sequence
        run.usage = replace(run.usage, cached_tokens=len(sequence))

    def _close(self, run: _Run) -> None:
        """Give a run's pages back; a conversation keeps those it has filled."""
        sequence, run.sequence = run.sequence, None
        if sequence is None:
            return
        if not run.is_chat:
            sequence.release()
            return
        self.reset()
        sequence.truncate(len(sequence))
        self._conversation = sequence

    def _advance(self, step: Callable[[Sequence[Row]], list[RowResult]], runs: list[_Run]) -> list[Token]:
        """One step and the token it gives to every run."""
        start = time.perf_counter()
        results = step([run.row for run in runs])
        for run, result in zip(runs, results, strict=True):
            run.take(result)
        seconds = time.perf_counter() - start
        weights, per_token = self.session.bundle.manifest.parameters.decode_bytes, self.session.cache_token_bytes
        tokens = [run.report(seconds, weights + per_token * len(run.sequence or ())) for run in runs]
        for run in runs:
            if run.is_finished:
                message(f"request {run.index} ends: {run.usage.completion_tokens} tokens, {run.finish_reason}")
                self._close(run)
        return tokens


class _Run:
    """One prompt on its way: what it has so far, and when it ends."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        max_seq_len: int,
        eos_token_ids: frozenset[int],
        text: TextStream,
        is_chat: bool,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.is_chat = is_chat
        self.most_tokens = min(len(prompt) + params.max_tokens, max_seq_len)
        self.sequence: CachedSequence | None = None
        self.usage = Usage(prompt_tokens=len(prompt))
        self.finish_reason: FinishReason | None = None
        self._tokens = list(prompt)
        self._sampler = None if params.is_greedy else Sampler(params)
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._decoder = text
        self._stop_text = StopText(params.stop)
        self._text = ""
        self._start = time.perf_counter()

    @property
    def is_finished(self) -> bool:
        """Whether it has its last token."""
        return self.finish_reason is not None

    @property
    def row(self) -> Row:
        """What the cache does not hold yet: the prompt, or its rest, at first; later the newest token."""
        assert self.sequence is not None
        return Row(self.sequence, tuple(self._tokens[len(self.sequence) :]))

    def take(self, result: RowResult) -> None:
        """Choose the next token, and see whether it is the last."""
        with zone("sample"):
            token = result.next_token if self._sampler is None else self._sampler.sample(result.logits())
        self._tokens.append(token)
        if token in self._eos_token_ids:
            self.finish_reason = "stop"
            self._text = ""
        else:
            with zone("detokenise"):
                self._text = self._stop_text.push(self._decoder.push(token))
            if len(self._tokens) == self.most_tokens:
                self.finish_reason = "length"
        if self.is_finished:
            self._text += self._stop_text.push(self._decoder.flush()) + self._stop_text.flush()
        if self._stop_text.found:
            self.finish_reason = "stop"

    def report(self, seconds: float, nbytes: int) -> Token:
        """The token that was taken, after a step that took so long and read so many bytes."""
        usage = replace(self.usage, completion_tokens=self.usage.completion_tokens + 1)
        if usage.completion_tokens == 1:
            ttft_s = time.perf_counter() - self._start
            self.usage = replace(usage, ttft_s=ttft_s, prefill_s=seconds)
        else:
            decode_s, decode_bytes = usage.decode_s + seconds, usage.decode_bytes + nbytes
            self.usage = replace(usage, decode_s=decode_s, decode_bytes=decode_bytes)
        return Token(self.index, self._tokens[-1], self._text, self.usage, self.finish_reason)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _collect(stream: Iterator[Token], count: int) -> list[Completion]:
    """The completions that a stream of `count` prompts' tokens amounts to."""
    tokens: list[list[Token]] = [[] for _ in range(count)]
    for token in stream:
        tokens[token.index].append(token)
    return [
        Completion(
            text="".join(token.text for token in run),
            tokens=tuple(token.token for token in run),
            finish_reason=run[-1].finish_reason or "length",
            usage=run[-1].usage,
        )
        for run in tokens
    ]
