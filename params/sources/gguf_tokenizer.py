"""The tokenizer that a GGUF file's metadata describes, as the files that transformers and tokenizers read.

transformers rebuilds tokenizers from GGUF too, but without the digit splitting of SmolLM, without Llama 3's rule that a
word of the vocabulary needs no merges, and without control tokens spelled outside the byte alphabet.

Source of the behaviour: llama-vocab.cpp of llama.cpp, and the tokenizer.json files that the models were published with.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmir_iree.params.errors import SourceError
from llmir_iree.params.sources.companions import write_json
from llmir_iree.params.sources.gguf_config import Metadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types of the sentencepiece model, which GGUF took over

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Splitting:
    """How a byte-level tokenizer cuts text before its merges.

    Attributes:
        words: the regex of a word, or None for GPT-2's.
        digits: whether every digit is a word.
        whole_words: whether a word of the vocabulary is taken as it is, whatever the merges say.
        normalized: whether text is brought to Unicode form C first.
        bos: whether the beginning of text is marked where the file does not say.
    """

    words: str | None = None
    digits: bool = False
    whole_words: bool = False
    normalized: bool = False
    bos: bool = False


_GPT2 = _Splitting()
_SMOLLM = _Splitting(digits=True)
_LLAMA3 = _Splitting(_LLAMA3_WORDS, whole_words=True, bos=True)
_QWEN2 = _Splitting(_QWEN2_WORDS, normalized=True)
_SPLITTINGS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": _Splitting(_LLAMA3_WORDS),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Splitting(_TEKKEN_WORDS, whole_words=True, bos=True),
}


def write_tokenizer(metadata: Metadata, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Warns where the file names a pre-tokenizer that is not known; text is then split as GPT-2 does.

    Raises:
        SourceError: the file has no tokenizer, one of an unknown model, or one that contradicts itself.
    """
    tokens = metadata.items("tokenizer.ggml.tokens", str)
    if not tokens:
        raise SourceError(f"{metadata.source} has no tokenizer: metadata field tokenizer.ggml.tokens is missing")
    builders = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}
    model = metadata.text("tokenizer.ggml.model")
    if model not in builders:
        raise SourceError(f"{metadata.source}: tokenizer model {model!r} is unknown; known are {', '.join(builders)}")
    types = metadata.items("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise SourceError(f"{metadata.source}: {len(tokens)} tokens, but {len(types)} token types")
    special = {
        name: _special_token(metadata, tokens, f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    try:
        tokenizer, add_bos = builders[model](metadata, tokens, types, special["unk"])
    except SourceError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, such as for a merge outside the vocabulary
        raise SourceError(f"{metadata.source}: the tokenizer contradicts itself: {error}") from error
    _add_whole_tokens(tokenizer, tokens, types)
    flags = {
        "bos": metadata.flag("tokenizer.ggml.add_bos_token", add_bos) and special["bos"] is not None,
        "eos": metadata.flag("tokenizer.ggml.add_eos_token", False) and special["eos"] is not None,
    }
    _mark_ends(tokenizer, special["bos"] if flags["bos"] else None, special["eos"] if flags["eos"] else None)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"add_{name}_token": value for name, value in flags.items()}
    config |= {f"{name}_token": token for name, token in special.items() if token is not None}
    config["model_max_length"] = metadata.count(f"{metadata.architecture}.context_length")
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", _generation_config(metadata))


def _special_token(metadata: Metadata, tokens: list[str], key: str) -> str | None:
    number = metadata.token(key)
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise SourceError(f"{metadata.source}: {key} is {number}, the vocabulary has {len(tokens)} tokens")
    return tokens[number]


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    ends = [metadata.token(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    numbers = list(dict.fromkeys(number for number in ends if number is not None))
    config = {
        "bos_token_id": metadata.token("tokenizer.ggml.bos_token_id"),
        "eos_token_id": numbers[0] if len(numbers) == 1 else numbers or None,
        "pad_token_id": metadata.token("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _build_byte_level(
    metadata: Metadata, tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, whose vocabulary spells every byte as one visible character."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.text("tokenizer.ggml.pre", "default")
    if name not in _SPLITTINGS:
        warnings.warn(
            f"{metadata.source}: pre-tokenizer {name!r} is unknown, so text is split as GPT-2 does; "
            f"known are {', '.join(_SPLITTINGS)}",
            stacklevel=2,
        )
    splitting = _SPLITTINGS.get(name, _GPT2)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = _read_merges(metadata)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    if splitting.normalized:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    if splitting.words is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.words), behavior="isolated"))
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", False)
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=splitting.words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.bos


def _build_sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """BPE in the manner of sentencepiece: spaces are written as "▁", characters not in the vocabulary as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = _read_merges(metadata)
    else:
        scores = metadata.items("tokenizer.ggml.scores", float)
        if scores is None or len(scores) != len(tokens):
            raise SourceError(f"{metadata.source}: tokenizer.ggml.scores has no score for each of {len(tokens)} tokens")
        merges = _derive_merges(tokens, types, scores)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # As a normalizer the prefix also follows every special token, which is what llama.cpp does.
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _read_merges(metadata: Metadata) -> list[tuple[str, str]]:
    merges = []
    for line in metadata.items("tokenizer.ggml.merges", str) or []:
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise SourceError(f"{metadata.source}: the merge {line!r} is not two tokens with a space between")
        merges.append((left, right))
    return merges


def _derive_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Recover the merges that scores imply: any two tokens whose union is a token merge, the best score first."""
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    # Bytes, control tokens and unused ones are not known: they never take part in a merge.
    ranked = sorted(
        ((score, token) for token, score in zip(tokens, scores, strict=True) if token in known),
        key=lambda pair: -pair[0],
    )
    return [
        (token[:cut], token[cut:])
        for _, token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Add the tokens that are matched in the text as they stand, before any splitting."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    )


def _mark_ends(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let encoding put `bos` before and `eos` after a text."""
    from tokenizers import processors

    marks = [mark for mark in (bos, eos) if mark is not None]
    if not marks:
        return
    before, after = [bos] if bos is not None else [], [eos] if eos is not None else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{mark}:1" for mark in before), "$B:1", *(f"{mark}:1" for mark in after)],
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in dict.fromkeys(marks)],
    )
