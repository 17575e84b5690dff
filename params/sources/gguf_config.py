"""The transformers config that a GGUF file's metadata describes.

transformers can derive one too, but takes seconds over it and leaves fields out: Qwen3's head size, and every kind of
rope scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmir_iree.params.errors import SourceError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF architectures and the transformers class of each; Mistral's files say llama."""

# Every Llama 3.1 and 3.2 was trained with these; a file keeps only the factors that they result in.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """Typed access to the metadata of one architecture; a wrong type or a missing field is a SourceError."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self._fields = fields
        self.source = source
        self.architecture = self.text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise SourceError(
                f"{source} is of the architecture {self.architecture!r}; supported are {', '.join(ARCHITECTURES)}"
            )

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value: str = self._field(key, (str,), "a string", default)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a bool."""
        value: bool = self._field(key, (bool,), "a bool", default)
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value: int = self._field(key, (int,), "an integer", default)
        if value < 1:
            raise SourceError(f"{self.source}: metadata field {key} is {value}, not positive")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive number, as the shortest decimal that its float32 stands for: 1e-05, not 9.99999975e-06."""
        value = float(self._field(key, (int, float), "a number", default))
        if not (math.isfinite(value) and value > 0):
            raise SourceError(f"{self.source}: metadata field {key} is {value}, not positive")
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else value

    def token(self, key: str) -> int | None:
        """Return a token id, or None where the file names none."""
        if key not in self._fields:
            return None
        value: int = self._field(key, (int,), "an integer", None)
        return value

    def items(self, key: str, kind: type) -> list[Any] | None:
        """Return a list whose elements are of one type, or None where the file has none."""
        if key not in self._fields:
            return None
        values: list[Any] = self._field(key, (list,), "an array", None)
        if not all(isinstance(value, kind) for value in values):
            raise SourceError(f"{self.source}: metadata field {key} is no array of {kind.__name__}")
        return values

    def _field(self, key: str, kinds: tuple[type, ...], expected: str, default: Any) -> Any:
        value = self._fields.get(key, default)
        if value is None:
            raise SourceError(f"{self.source}: metadata field {key} is missing")
        if type(value) not in kinds:
            raise SourceError(f"{self.source}: metadata field {key} is {_shorten(value)}, not {expected}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._fields


def transformers_config(
    metadata: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Build the content of config.json.

    Args:
        metadata: of the file.
        shapes: of its tensors, by GGUF name and in torch order.
        rope_factors: [head_dim / 2], the tensor rope_freqs.weight, by which Llama 3 divides its frequencies.

    Raises:
        SourceError: a field is missing, contradicts another, or describes what the architecture does not do.
    """
    name = metadata.architecture
    heads = metadata.count(f"{name}.attention.head_count")
    kv_heads = metadata.count(f"{name}.attention.head_count_kv", heads)
    hidden = metadata.count(f"{name}.embedding_length")
    rotary = metadata.count(f"{name}.rope.dimension_count", max(1, hidden // heads))
    head_dim = metadata.count(f"{name}.attention.key_length", rotary)
    if heads % kv_heads:
        raise SourceError(f"{metadata.source}: {heads} attention heads are no multiple of {kv_heads} key-value heads")
    if rotary != head_dim or metadata.count(f"{name}.attention.value_length", head_dim) != head_dim:
        raise SourceError(f"{metadata.source}: keys, values and rope must share one head size, here {head_dim}")
    if f"{name}.expert_count" in metadata:
        raise SourceError(f"{metadata.source} is a mixture of experts; supported are dense models")
    config = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": _vocab_size(metadata, shapes),
        "hidden_size": hidden,
        "intermediate_size": metadata.count(f"{name}.feed_forward_length"),
        "num_hidden_layers": metadata.count(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.count(f"{name}.context_length"),
        "rms_norm_eps": metadata.real(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(metadata, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.token("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.token("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.token("tokenizer.ggml.padding_token_id"),
    }
    if name != "qwen2":  # whose biases are no matter of choice
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if name == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    return config


def llama3_rope_factors(theta: float, head_dim: int, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3.1 divides each of its head_dim / 2 frequencies by.

    Source: `apply_scaling` of the reference implementation of Llama 3.1, in the form of llama.cpp's converter.
    """
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    context = _LLAMA3_ROPE["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    # Long waves are stretched by `factor`, short ones left alone, those between in proportion.
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return factors


def _rope_parameters(metadata: Metadata, head_dim: int, rope_factors: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    name = metadata.architecture
    theta = metadata.real(f"{name}.rope.freq_base", 10000.0)
    scaling = metadata.text(f"{name}.rope.scaling.type", "none")
    if rope_factors is not None:
        return _llama3_rope(metadata.source, theta, head_dim, rope_factors)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        raise SourceError(f"{metadata.source}: rope scaling {scaling!r} is unknown; known are none, linear, yarn")
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": metadata.real(f"{name}.rope.scaling.factor")}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = metadata.count(f"{name}.rope.scaling.original_context_length")
    return rope


def _llama3_rope(source: str, theta: float, head_dim: int, rope_factors: npt.NDArray[np.float32]) -> dict[str, Any]:
    factor = float(rope_factors.max())
    if rope_factors.shape == (head_dim // 2,) and factor >= 1:
        if factor == 1:
            return {"rope_type": "default", "rope_theta": theta}
        if np.allclose(rope_factors, llama3_rope_factors(theta, head_dim, factor), rtol=1e-4):
            return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3_ROPE}
    raise SourceError(
        f"{source}: rope_freqs.weight (up to {factor:g}) is not the scaling of Llama 3, the only one supported"
    )


def _vocab_size(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> int:
    table = shapes.get("token_embd.weight")
    if table is None or len(table) != 2:
        raise SourceError(f"{metadata.source} has no matrix token_embd.weight, so it is not a whole model")
    rows = table[0]
    tokens = metadata.items("tokenizer.ggml.tokens", str)
    stated = {
        f"{metadata.architecture}.vocab_size": metadata.count(f"{metadata.architecture}.vocab_size", rows),
        "tokenizer.ggml.tokens": rows if tokens is None else len(tokens),
    }
    for key, count in stated.items():
        if count != rows:
            raise SourceError(f"{metadata.source}: {key} says {count} tokens, token_embd.weight has {rows} rows")
    return rows


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
