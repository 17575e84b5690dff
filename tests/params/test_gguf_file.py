from __future__ import annotations

import gguf
import numpy as np
import pytest

from llmir_iree.params import SourceError, open_checkpoint
from llmir_iree.params.quantize import dequantize


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
def test_weights_are_those_of_the_model(kind, gguf_spec, make_gguf, weights):
    gguf_spec.matrix_type = gguf.GGMLQuantizationType[kind]
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        assert checkpoint.kind == "gguf"
        assert set(checkpoint.tensors) == set(weights)
        for name, values in weights.items():
            info = checkpoint.tensors[name]
            assert info.shape == values.shape
            expected = values
            if values.ndim == 2:
                assert info.encoding == kind.lower()
                expected = gguf.quants.dequantize(
                    gguf.quants.quantize(values, gguf_spec.matrix_type), gguf_spec.matrix_type
                ).reshape(values.shape)
            assert (dequantize(checkpoint.read(name), info.encoding, info.shape) == expected).all()


def test_rows_can_be_read_apart(gguf_spec, make_gguf):
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        for name in checkpoint.tensors:
            whole = checkpoint.read(name)
            assert (checkpoint.read_rows(name, 3, 9) == whole[3:9]).all()


def test_rows_in_order_are_views_of_the_file(gguf_spec, make_gguf):
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        first, again = (checkpoint.read("model.layers.0.self_attn.v_proj.weight") for _ in range(2))
        assert np.shares_memory(first, again)


@pytest.mark.parametrize(("heads", "rows"), [(4, 64), (2, 32)])
def test_permuted_rows_as_transformers_restores_them(heads, rows, gguf_spec, make_gguf):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    module = {4: "q", 2: "k"}[heads]
    path = make_gguf(gguf_spec)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == f"blk.1.attn_{module}.weight")
    restored = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2}).process(
        gguf.quants.dequantize(stored.data, stored.tensor_type), stored.name
    )
    with open_checkpoint(path) as checkpoint:
        blocks = checkpoint.read(f"model.layers.1.self_attn.{module}_proj.weight")
    assert blocks.shape == (rows, 68)
    assert (dequantize(blocks, "q8_0", (rows, 64)) == restored.weights).all()


def test_biases_are_permuted_with_their_rows(gguf_spec, make_gguf, permute_rows):
    bias = np.arange(32, dtype=np.float32)
    gguf_spec.raw_tensors = {"blk.0.attn_k.bias": permute_rows(bias, 2)}
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        assert (checkpoint.read("model.layers.0.self_attn.k_proj.bias") == bias).all()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures_are_not_permuted(architecture, gguf_spec, make_gguf, weights):
    gguf_spec.architecture = architecture
    gguf_spec.matrix_type = gguf.GGMLQuantizationType.F32
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        assert (checkpoint.read(name) == weights[name]).all()


@pytest.mark.parametrize("architecture", [gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3])
def test_names_agree_with_the_table_of_the_gguf_package(architecture):
    from llmir_iree.params.sources.gguf_file import _translate

    table = gguf.get_tensor_name_map(architecture, 3)
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    modules += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    modules += ["self_attn.q_norm", "self_attn.k_norm"] if architecture == gguf.MODEL_ARCH.QWEN3 else []
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.2.{module}.{part}" for module in modules for part in ("weight", "bias")]
    for name in names:
        assert _translate(table.get_name(name, try_suffixes=(".weight", ".bias"))) == name


@pytest.mark.parametrize("name", ["blk.0.attn_sub_norm.weight", "blk.0.attn_q.scale", "rope_factors_long.weight", "x"])
def test_tensors_without_a_place_are_refused(name, gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {name: np.zeros(8, np.float32)}
    path = make_gguf(gguf_spec)
    with pytest.raises(SourceError, match=f"tensor {name} has no place in a llama model"):
        open_checkpoint(path)


def test_hostile_names_make_one_printable_line(gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {"a\nb\x1b[31m" + "c" * 5000: np.zeros(8, np.float32)}
    path = make_gguf(gguf_spec)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert r"tensor a\nb\x1b[31mccc" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1100


def test_rows_that_are_no_heads_are_refused(gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {"blk.0.attn_q.bias": np.zeros(63, np.float32)}
    path = make_gguf(gguf_spec)
    with pytest.raises(SourceError, match=r"tensor blk.0.attn_q.bias has 63 rows, not 4 heads of an even size of 16"):
        open_checkpoint(path)


def test_integers_are_no_weights(gguf_spec, make_gguf):
    gguf_spec.raw_tensors = {"blk.0.ffn_up.bias": np.zeros(8, np.int32)}
    with (
        open_checkpoint(make_gguf(gguf_spec)) as checkpoint,
        pytest.raises(SourceError, match="stored as i32; weights must be f32, f16 or bf16"),
    ):
        checkpoint.read("model.layers.0.mlp.up_proj.bias")


def test_smollm2(smollm2):
    assert len(smollm2.tensors) == 272
    assert smollm2.nbytes == 96_576_768
    assert smollm2.tensors["model.embed_tokens.weight"].encoding == "q8_0"
    down = smollm2.tensors["model.layers.29.mlp.down_proj.weight"]
    assert (down.shape, down.encoding) == ((576, 1536), "q4_1")
    assert smollm2.read(down.name).shape == (576, 1536 // 32 * 20)
