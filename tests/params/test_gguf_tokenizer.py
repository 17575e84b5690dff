from __future__ import annotations

import itertools
import json
import re

import gguf
import pytest
from tokenizers import Tokenizer

from llmir_iree.params import SourceError, open_checkpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
VOCAB = 48


def byte_characters() -> dict[int, str]:
    """GPT-2's spelling of bytes: visible ones stand for themselves, the others count up from 256."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


SPELLING = byte_characters()


def spell(text: str) -> str:
    return "".join(SPELLING[byte] for byte in text.encode())


@pytest.fixture
def save(gguf_spec, make_gguf, tmp_path):
    """Save the tokenizer of a tiny GGUF file whose vocabulary is padded with unused tokens."""

    def run(tokens, types, model="gpt2", **fields):
        padding = VOCAB - len(tokens)
        gguf_spec.tokens = [*tokens, *(f"[PAD{number}]" for number in range(padding))]
        gguf_spec.fields = {
            "tokenizer.ggml.model": model,
            "tokenizer.ggml.token_type": [*types, *[UNUSED] * padding],
            **{f"tokenizer.{key.replace('__', '.')}": value for key, value in fields.items()},
        }
        if "tokenizer.ggml.scores" in gguf_spec.fields:
            gguf_spec.fields["tokenizer.ggml.scores"] = [*fields["ggml__scores"], *[0.0] * padding]
        with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
            checkpoint.save_tokenizer(tmp_path / "out")
        return Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))

    return run


LETTERS = [spell(letter) for letter in "abchelo 123?!'\nA"]
FIN = "<\uff5cfin\uff5c>"  # spelled outside the byte alphabet, as DeepSeek does
WORDS = [*LETTERS, "<|end|>", "<think>", FIN, "he", "ll", spell(" a"), "hello", "12", "123"]
TYPES = [*[NORMAL] * len(LETTERS), CONTROL, USER_DEFINED, CONTROL, *[NORMAL] * 6]
MERGES = ["h e", "l l", "Ġ a", "1 2", "12 3"]


def cut(save, pre, text):
    return save(WORDS, TYPES, ggml__pre=pre, ggml__merges=MERGES).encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "a123", ["a", "123"]),
        ("default", "a123 a", ["a", "123", "Ġa"]),
        ("smollm", "a123 a", ["a", "1", "2", "3", "Ġa"]),
        ("starcoder", "12", ["1", "2"]),
        ("llama-bpe", "123123", ["123", "123"]),
        ("llama-bpe", "1231", ["123", "1"]),
        ("llama-bpe", "hello", ["hello"]),  # no merges lead to it: the whole word is looked up
        ("smaug-bpe", "hello", ["he", "ll", "o"]),
        ("qwen2", "a123", ["a", "1", "2", "3"]),
        ("qwen2", "hello a", ["he", "ll", "o", "Ġa"]),
        ("deepseek-r1-qwen", "12", ["1", "2"]),
        ("tekken", "12hello", ["1", "2", "hello"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(pre, text, tokens, save):
    assert cut(save, pre, text) == tokens


def test_control_and_user_defined_tokens_stay_whole(save):
    tokenizer = save(WORDS, TYPES, ggml__pre="qwen2", ggml__merges=MERGES)
    encoded = tokenizer.encode(f"a<|end|><think>b{FIN}")
    assert encoded.tokens == ["a", "<|end|>", "<think>", "b", FIN]
    assert encoded.ids == [WORDS.index(token) for token in encoded.tokens]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == f"a<|end|><think>b{FIN}"
    assert tokenizer.get_vocab_size() == VOCAB


def test_config_names_special_tokens_and_template(save, tmp_path):
    save(
        WORDS,
        TYPES,
        ggml__pre="qwen2",
        ggml__merges=MERGES,
        ggml__bos_token_id=16,
        ggml__eos_token_id=18,
        ggml__eot_token_id=16,
        chat_template="{{ bos_token }}",
    )
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["bos_token"] == "<|end|>"
    assert config["eos_token"] == FIN
    assert config["chat_template"] == "{{ bos_token }}"
    assert config["model_max_length"] == 128
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 16,
        "eos_token_id": [18, 16],
    }


@pytest.mark.parametrize(
    ("pre", "flags", "tokens"),
    [
        ("qwen2", {}, ["a"]),
        ("llama-bpe", {}, ["<|end|>", "a"]),
        ("llama-bpe", {"ggml__add_bos_token": False}, ["a"]),
        ("qwen2", {"ggml__add_bos_token": True}, ["<|end|>", "a"]),
        ("qwen2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, ["<|end|>", "a", FIN]),
    ],
)
def test_ends_of_a_text_are_marked(pre, flags, tokens, save):
    ids = {"ggml__bos_token_id": 16, "ggml__eos_token_id": 18}
    tokenizer = save(WORDS, TYPES, ggml__pre=pre, ggml__merges=MERGES, **ids, **flags)
    assert tokenizer.encode("a").tokens == tokens
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert tokenizer.encode("a", "b").tokens == [*tokens, *(token.replace("a", "b") for token in tokens)]


def test_unknown_pre_tokenizer_warns(save):
    with pytest.warns(UserWarning, match="pre-tokenizer 'martian' is unknown, so text is split as GPT-2 does"):
        assert cut(save, "martian", "123") == ["123"]


PIECES = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "<0x0A>", "▁", "h", "i", "hi", "ih", "▁h", "<sep>"]
PIECE_TYPES = [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE, BYTE, *[NORMAL] * 6, USER_DEFINED]
SCORES = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -6.0, -5.0, -4.0, -2.0, -3.0, -1.0, 0.0]


def save_pieces(save, **fields):
    ids = {"ggml__bos_token_id": 1, "ggml__eos_token_id": 2, "ggml__unknown_token_id": 0}
    return save(PIECES, PIECE_TYPES, "llama", ggml__scores=SCORES, **ids, **fields)


def test_sentencepiece_merges_by_score(save):
    tokenizer = save_pieces(save)
    assert tokenizer.encode("hi").tokens == ["<s>", "▁h", "i"]  # "▁h" scores above "hi"
    assert tokenizer.encode("hi hi", add_special_tokens=False).tokens == ["▁h", "i", "▁h", "i"]
    assert tokenizer.encode("é\n", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.encode("hi<sep>hi</s>", add_special_tokens=False).ids == [11, 8, 12, 11, 8, 2]


@pytest.mark.parametrize("text", ["hi", " hi", "hi  hi", "é\nhi"])
def test_sentencepiece_round_trip(text, save):
    tokenizer = save_pieces(save)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_without_prefix(save):
    tokenizer = save_pieces(save, ggml__add_space_prefix=False)
    assert tokenizer.encode("hi", add_special_tokens=False).tokens == ["hi"]
    assert tokenizer.decode(tokenizer.encode(" hi").ids) == " hi"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ggml__merges": ["a"]}, "the merge 'a' is not two tokens with a space between"),
        ({"ggml__merges": ["x y"]}, "the tokenizer contradicts itself"),
        ({"ggml__merges": MERGES, "ggml__bos_token_id": 48}, "bos_token_id is 48, the vocabulary has 48 tokens"),
        ({"model": "bert"}, "tokenizer model 'bert' is unknown; known are gpt2, llama"),
        ({"model": "llama"}, "tokenizer.ggml.scores has no score for each of 48 tokens"),
    ],
)
def test_contradictions_are_refused(fields, message, save):
    with pytest.raises(SourceError) as caught:
        save(WORDS, TYPES, **{"ggml__pre": "gpt-2"} | fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_without_tokenizer(gguf_spec, make_gguf, tmp_path):
    with (
        open_checkpoint(make_gguf(gguf_spec)) as checkpoint,
        pytest.raises(SourceError, match=r"has no tokenizer: metadata field tokenizer.ggml.tokens is missing"),
    ):
        checkpoint.save_tokenizer(tmp_path / "out")


class ReferenceTokenizer:
    """SmolLM2's tokenizer, the dullest way: split with the standard library, merge the best pair until none is left."""

    words = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?[0-9]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

    def __init__(self, metadata):
        self.ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(metadata["tokenizer.ggml.merges"])}
        types = metadata["tokenizer.ggml.token_type"]
        control = [token for token, number in self.ids.items() if types[number] == CONTROL]
        self.control = re.compile("(" + "|".join(map(re.escape, control)) + ")")

    def encode(self, text):
        ids = []
        for part in self.control.split(text):
            if self.control.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for run in re.split(r"([0-9])", part):
                ids += [self.ids[piece] for word in self.words.findall(run) for piece in self.merge(spell(word))]
        return ids

    def merge(self, word):
        pieces = list(word)
        while pairs := [(self.ranks[p], i) for i, p in enumerate(itertools.pairwise(pieces)) if p in self.ranks]:
            _, at = min(pairs)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "1234",
        "In 1984, 3.14159 isn't 22/7.",
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
        "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(10))",
        "naïve façade, Ελληνικά, 日本語, 🦙",
        "  leading and trailing  ",
        "don't we'll I'M",
    ],
)
def test_smollm2_against_a_reference(text, smollm2, tmp_path):
    smollm2.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == ReferenceTokenizer(smollm2.metadata).encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm2_known_ids(smollm2, tmp_path):
    smollm2.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    assert len(tokenizer.encode("1234").ids) == 4
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_smollm2_through_transformers(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer) == 49152
    assert tokenizer("1234")["input_ids"] == [33, 34, 35, 36]


def test_gguf_package_writes_the_types_that_the_tests_name():
    kinds = gguf.TokenType
    assert (kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED, kinds.BYTE) == (
        1,
        2,
        3,
        4,
        5,
        6,
    )
