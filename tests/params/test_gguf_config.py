from __future__ import annotations

import numpy as np
import pytest

from llmir_iree.params import SourceError, open_checkpoint
from llmir_iree.params.sources.gguf_config import llama3_rope_factors


@pytest.fixture
def config_of(make_gguf, gguf_spec):
    def read(**fields):
        gguf_spec.fields = {key.replace("__", "."): value for key, value in fields.items()}
        with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
            return checkpoint.config

    return read


def test_config_is_what_transformers_needs(config_of, tiny_config):
    from transformers import AutoConfig

    config = config_of(
        tokenizer__ggml__bos_token_id=1, tokenizer__ggml__eos_token_id=2, tokenizer__ggml__padding_token_id=3
    )
    assert tiny_config.items() <= config.items()
    model = AutoConfig.for_model(**config)
    assert model.head_dim == 16
    assert model.rms_norm_eps == 1e-5
    assert model.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (1, 2, 3)
    assert model.max_position_embeddings == 128
    assert not model.attention_bias


def test_head_size_apart_from_the_hidden_size(gguf_spec, make_gguf):
    gguf_spec.architecture = "qwen3"
    gguf_spec.fields = {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}
    gguf_spec.fields["qwen3.rope.dimension_count"] = 32
    config = open_checkpoint(make_gguf(gguf_spec)).config
    assert config["head_dim"] == 32
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_output_matrix_unties_the_table(gguf_spec, make_gguf, weights):
    gguf_spec.weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    checkpoint = open_checkpoint(make_gguf(gguf_spec))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.tensors


def test_biases_show_in_the_config(gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    config = open_checkpoint(make_gguf(gguf_spec)).config
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is False


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered_as_transformers_computes_it(factor, gguf_spec, make_gguf):
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    gguf_spec.fields = {"llama.rope.dimension_count": 16}
    gguf_spec.raw_tensors = {"rope_freqs.weight": llama3_rope_factors(10000.0, 16, factor).astype(np.float32)}
    checkpoint = open_checkpoint(make_gguf(gguf_spec))
    assert "rope_freqs.weight" not in checkpoint.tensors
    assert checkpoint.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = AutoConfig.for_model(**{**checkpoint.config, "max_position_embeddings": 131072})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](model, torch.device("cpu"))
    plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(frequencies.numpy(), plain / gguf_spec.raw_tensors["rope_freqs.weight"], rtol=1e-5)


def test_factors_of_one_are_no_scaling(gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert open_checkpoint(make_gguf(gguf_spec)).config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 8), np.full(8, 0.5), np.ones(7), np.full(8, np.nan)])
def test_other_factors_are_refused(factors, gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {"rope_freqs.weight": factors.astype(np.float32)}
    path = make_gguf(gguf_spec)
    with pytest.raises(SourceError, match=r"rope_freqs.weight .* is not the scaling of Llama 3"):
        open_checkpoint(path)


def test_linear_and_yarn_scaling(config_of):
    linear = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}
    assert config_of(**linear)["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    yarn = linear | {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__original_context_length": 64}
    assert config_of(**yarn)["rope_parameters"]["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama__vocab_size": 50}, "llama.vocab_size says 50 tokens, token_embd.weight has 48 rows"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, "tokenizer.ggml.tokens says 2 tokens, token_embd.weight has 48"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens is no array of str"),
        ({"llama__rope__scaling__type": "su"}, "rope scaling 'su' is unknown; known are none, linear, yarn"),
        ({"llama__rope__dimension_count": 8, "llama__attention__key_length": 16}, "must share one head size, here 16"),
        ({"llama__expert_count": 8}, "is a mixture of experts"),
        ({"tokenizer__ggml__bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x', not an integer"),
        ({"llama__rope__scaling__type": 5}, "llama.rope.scaling.type is 5, not a string"),
        ({"split__count": 3}, "is one of 3 parts; merge them: llama-gguf-split --merge"),
    ],
)
def test_contradictions_are_refused(fields, message, config_of):
    with pytest.raises(SourceError) as caught:
        config_of(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unsupported_architecture_lists_the_supported(gguf_spec, make_gguf):
    gguf_spec.architecture = "mamba"
    path = make_gguf(gguf_spec)
    with pytest.raises(SourceError, match="architecture 'mamba'; supported are llama, qwen2, qwen3"):
        open_checkpoint(path)


def test_smollm2(smollm2):
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert expected.items() <= smollm2.config.items()
