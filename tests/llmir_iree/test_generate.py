from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest

import llmir_iree
from llmir_iree import LLM, SamplingParams
from llmir_iree.params.errors import BundleError, RequestError

EOS = 1


@pytest.fixture
def llm(tiny: Any) -> LLM:
    return LLM(tiny.folder)


def expected_tokens(llm: LLM, tiny: Any, prompt: str, count: int) -> list[int]:
    return tiny.greedy(llm.tokenizer.encode(prompt), count)


def find_prompt(llm: LLM, tiny: Any, holds: Any, count: int = 8) -> tuple[str, list[int]]:
    """A prompt after which the model's next tokens fulfil a condition."""
    for letters in product("abcdefghijklm", repeat=3):
        prompt = "".join(letters)
        tokens = expected_tokens(llm, tiny, prompt, count)
        if holds(tokens):
            return prompt, tokens
    raise AssertionError("no prompt does that")


def calm_prompt(llm: LLM, tiny: Any, count: int = 8) -> tuple[str, list[int]]:
    """One whose answer holds letters only."""
    return find_prompt(llm, tiny, lambda tokens: all(4 <= token < 30 for token in tokens), count)


# One prompt


def test_the_answer_is_the_models(llm: LLM, tiny: Any) -> None:
    prompt, tokens = calm_prompt(llm, tiny)
    completion = llm.generate(prompt, SamplingParams(max_tokens=8))
    assert completion.tokens == tuple(tokens)
    assert completion.text == llm.tokenizer.decode(tokens)
    assert completion.finish_reason == "length"
    assert llm.session.pool.free == llm.session.pool.usable, "pages were not given back"


def test_a_stream_carries_text_and_running_counts(llm: LLM, tiny: Any) -> None:
    prompt, tokens = calm_prompt(llm, tiny)
    stream = list(llm.stream(prompt, SamplingParams(max_tokens=8)))
    assert [token.token for token in stream] == tokens
    assert [token.usage.completion_tokens for token in stream] == list(range(1, 9))
    assert [token.finish_reason for token in stream] == [None] * 7 + ["length"]
    first, last = stream[0].usage, stream[-1].usage
    assert (first.prompt_tokens, first.cached_tokens) == (4, 0)
    assert first.ttft_s >= first.prefill_s > 0
    assert first.decode_tok_s is None
    assert first.decode_bytes_s is None
    assert last.ttft_s == first.ttft_s
    assert last.prefill_tok_s == pytest.approx(4 / first.prefill_s)
    assert last.decode_tok_s == pytest.approx(7 / last.decode_s)
    # Steps at 5 to 11 tokens of cache, 16 bytes each, beside a table of 34 x 34 f32.
    assert last.decode_bytes == 7 * 34 * 34 * 4 + 16 * sum(range(5, 12))


def test_leaving_a_stream_gives_the_pages_back(llm: LLM, tiny: Any) -> None:
    stream = llm.stream("abc")
    next(stream)
    assert llm.session.pool.free < llm.session.pool.usable
    stream.close()
    assert llm.session.pool.free == llm.session.pool.usable


def test_streams_can_be_read_in_turns(tiny: Any) -> None:
    llm = LLM(tiny.folder, pages=40)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    pairs = list(zip(llm.stream("abc", params), llm.stream("dcba", params), strict=True))
    assert [left.token for left, _ in pairs] == expected_tokens(llm, tiny, "abc", 6)
    assert [right.token for _, right in pairs] == expected_tokens(llm, tiny, "dcba", 6)


# Ends


def test_an_end_of_sequence_ends_it(llm: LLM, tiny: Any) -> None:
    prompt, tokens = find_prompt(llm, tiny, lambda tokens: EOS in tokens[1:])
    until = tokens.index(EOS)
    completion = llm.generate(prompt)
    assert completion.finish_reason == "stop"
    assert completion.tokens == tuple(tokens[: until + 1])
    assert completion.text == llm.tokenizer.decode(tokens[:until])
    assert llm.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True)).tokens == tuple(tokens)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_it_wherever_tokens_are_split(llm: LLM, tiny: Any, length: int) -> None:
    prompt, tokens = calm_prompt(llm, tiny)
    text = llm.tokenizer.decode(tokens)
    stop = text[4 : 4 + length]
    stream = list(llm.stream(prompt, SamplingParams(max_tokens=8, stop=("zzzz", stop))))
    shown = "".join(token.text for token in stream)
    assert shown == text[: text.index(stop)]
    assert stream[-1].finish_reason == "stop"
    assert len(stream) == text.index(stop) + length


def test_text_that_only_begins_a_stop_string_is_shown_in_the_end(llm: LLM, tiny: Any) -> None:
    prompt, tokens = calm_prompt(llm, tiny)
    text = llm.tokenizer.decode(tokens)
    stream = list(llm.stream(prompt, SamplingParams(max_tokens=8, stop=(text[-2:] + "!",))))
    assert [token.text for token in stream][-2:] == ["", text[-2:]]
    assert stream[-1].finish_reason == "length"


def test_half_a_character_is_shown_only_in_the_end(llm: LLM, tiny: Any) -> None:
    first_byte = 32
    prompt, tokens = find_prompt(llm, tiny, lambda tokens: first_byte in tokens[1:4] and EOS not in tokens)
    at = tokens.index(first_byte)
    stream = list(llm.stream(prompt, SamplingParams(max_tokens=at + 1)))
    assert stream[-1].text == "\ufffd"
    whole = list(llm.stream(prompt, SamplingParams(max_tokens=8)))
    assert whole[at].text == ""
    assert "".join(token.text for token in whole) == llm.tokenizer.decode(tokens)


def test_max_seq_len_ends_it(llm: LLM, tiny: Any) -> None:
    completion = llm.generate("a" * 58, SamplingParams(ignore_eos=True))
    assert completion.usage.prompt_tokens == 59
    assert len(completion.tokens) == 5
    assert completion.finish_reason == "length"


# Refusals


def test_a_prompt_that_does_not_fit_is_refused(tiny: Any) -> None:
    llm = LLM(tiny.folder, max_seq_len=10)
    assert len(llm.generate("a" * 8).tokens) == 1
    message = "the prompt has 10 tokens; max_seq_len is 10, the answer's included"
    with pytest.raises(RequestError, match=message):
        llm.stream("a" * 9)  # At once, not when the stream is read.
    with pytest.raises(RequestError, match=message):
        llm.generate(["a", "a" * 9])


def test_an_empty_prompt_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm._run(0, [], SamplingParams())


def test_a_cache_too_small_is_refused_with_the_numbers(tiny: Any) -> None:
    llm = LLM(tiny.folder, pages=4)
    assert len(llm.generate("abc", SamplingParams(max_tokens=9, ignore_eos=True)).tokens) == 9
    with pytest.raises(RequestError, match="4 more pages of 4 tokens are needed, 3 of 3 are free"):
        llm.generate("abc", SamplingParams(max_tokens=10))


def test_a_module_names_its_target(tiny: Any) -> None:
    module = tiny.folder / "cpu" / "decode.vmfb"
    assert LLM(module).session.target.target == "cpu"
    with pytest.raises(BundleError, match=r"decode\.vmfb is compiled for cpu, not for gpu"):
        LLM(module, target="gpu")


# Sampling


def test_sampled_answers_repeat_with_their_seed_whatever_runs_beside(tiny: Any) -> None:
    llm = LLM(tiny.folder, pages=60)
    params = SamplingParams(max_tokens=12, temperature=3.0, seed=5, ignore_eos=True)
    alone = llm.generate("abc", params).tokens
    assert alone == llm.generate("abc", params).tokens
    assert alone == llm.generate(["hgf", "abc", "aaaa"], params)[1].tokens
    assert list(alone) != expected_tokens(llm, tiny, "abc", 12)


def test_a_greedy_answer_reads_no_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmir_iree.session import StepResult

    monkeypatch.setattr(StepResult, "logits", lambda self: pytest.fail("logits were read"))
    llm.generate("abc")


# Lists of prompts


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_a_list_is_answered_as_one_by_one(tiny: Any, count: int) -> None:
    llm = LLM(tiny.folder, pages=60)
    prompts = ["abcdefghijk"[: index + 1] for index in range(count)]
    params = SamplingParams(max_tokens=10)
    completions = llm.generate(prompts, params)
    assert [completion.tokens for completion in completions] == [llm.generate(p, params).tokens for p in prompts]
    assert llm.session.pool.free == llm.session.pool.usable


def test_a_list_runs_in_batches(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny.folder, pages=60)
    calls = []
    run = llm.session.run
    monkeypatch.setattr(
        llm.session, "run", lambda phase, size, *rest: calls.append((phase, size)) or run(phase, size, *rest)
    )
    llm.generate(["abc"] * 4, SamplingParams(max_tokens=5, ignore_eos=True))
    assert calls == [("prefill", 1)] * 4 + [("decode", 4)] * 4


def test_prompts_wait_for_pages(tiny: Any) -> None:
    """Each needs 3 of 6 pages: two run at a time, and none fails."""
    llm = LLM(tiny.folder, pages=7)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    completions = llm.generate(["abc", "bcd", "cde", "def", "efg"], params)
    for prompt, completion in zip(("abc", "bcd", "cde", "def", "efg"), completions, strict=True):
        assert list(completion.tokens) == expected_tokens(llm, tiny, prompt, 9)


# Chat


def test_a_chat_renders_the_template(llm: LLM, tiny: Any) -> None:
    messages = [{"role": "user", "content": "abc"}]
    prompt = llm.tokenizer.encode("<s><|user|>abc\n<|assistant|>", add_special=False)
    completion = llm.chat(messages, SamplingParams(max_tokens=6, ignore_eos=True))
    assert list(completion.tokens) == tiny.greedy(prompt, 6)


def test_a_conversation_goes_on_in_the_cache(llm: LLM, tiny: Any) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    messages = [{"role": "user", "content": "abc"}]
    first = llm.chat(messages, params)
    assert first.usage.cached_tokens == 0
    messages += [{"role": "assistant", "content": "xy"}, {"role": "user", "content": "ef"}]
    second = llm.chat(messages, params)
    prompt = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(messages), add_special=False)
    # The cache's tokens end with the first answer, of which the next prompt says something else.
    assert second.usage.cached_tokens == 7
    assert second.usage.prompt_tokens == len(prompt)
    assert list(second.tokens) == tiny.greedy(prompt, 6)
    # The same again: all but the last token is kept.
    third = llm.chat(messages, params)
    assert third.usage.cached_tokens == len(prompt) - 1
    assert third.tokens == second.tokens


def test_a_reset_forgets_the_conversation(llm: LLM) -> None:
    messages = [{"role": "user", "content": "abc"}]
    llm.chat(messages, SamplingParams(max_tokens=2))
    llm.reset()
    assert llm.session.pool.free == llm.session.pool.usable
    assert llm.chat(messages).usage.cached_tokens == 0


def test_a_conversation_makes_room_for_a_prompt(llm: LLM, tiny: Any) -> None:
    llm.chat([{"role": "user", "content": "a" * 40}], SamplingParams(max_tokens=2))
    prompt = "b" * 50
    assert list(llm.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True)).tokens) == expected_tokens(
        llm, tiny, prompt, 4
    )


def test_an_interrupted_answer_stays_in_the_cache(llm: LLM) -> None:
    messages = [{"role": "user", "content": "abc"}]
    stream = llm.stream_chat(messages, SamplingParams(ignore_eos=True))
    for _ in range(3):
        next(stream)
    stream.close()
    assert llm.chat(messages).usage.cached_tokens == 6


# The package


def test_the_package_offers_the_api_without_importing_it() -> None:
    program = "import sys, llmir_iree; assert not {'numpy', 'iree', 'pydantic'} & set(sys.modules); llmir_iree.LLM"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert all(getattr(llmir_iree, name).__name__ == name for name in llmir_iree.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        llmir_iree.nonsense  # noqa: B018


def test_running_a_model_imports_neither_torch_nor_transformers(tiny: Any) -> None:
    program = f"""
import sys
from llmir_iree import LLM, SamplingParams
LLM({str(tiny.folder)!r}).chat([dict(role="user", content="abc")], SamplingParams(temperature=1.0))
assert not {{"torch", "transformers", "iree.compiler"}} & set(sys.modules), "heavy imports"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
