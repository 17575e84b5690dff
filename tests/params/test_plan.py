from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmir_iree.params import (
    FORMATS,
    QUANT_CHOICES,
    ParameterError,
    PlannedWeight,
    SourceError,
    TensorInfo,
    WeightSpec,
    describe_conversions,
    plan_weights,
)


class Listing:
    """Just the part of a checkpoint that a plan looks at."""

    source = "model.gguf"

    def __init__(self, *tensors: tuple[str, tuple[int, ...], str]) -> None:
        self.tensors = {name: TensorInfo(name, shape, encoding, 0) for name, shape, encoding in tensors}


def plan_one(encoding: str, quant: str = "keep", kind: str = "linear", columns: int = 256) -> PlannedWeight:
    shape = (columns,) if kind == "vector" else (8, columns)
    (weight,) = plan_weights(Listing(("w", shape, encoding)), [WeightSpec("w", shape, kind)], quant)
    return weight


@pytest.mark.parametrize("encoding", FORMATS)
def test_keep_keeps_what_a_bundle_may_hold(encoding):
    weight = plan_one(encoding)
    assert weight.format == encoding
    assert not weight.converted


@pytest.mark.parametrize(
    ("encoding", "quant", "columns", "stored"),
    [
        ("q5_0", "keep", 64, "q8_0"),
        ("iq4_nl", "keep", 32, "q8_0"),
        ("iq2_xxs", "q4_0", 256, "q4_0"),
        ("f16", "q4_0", 33, "f16"),
        ("bf16", "q8_0", 31, "f16"),
        ("f32", "q4_0", 32, "q4_0"),
        ("q4_0", "q4_0", 32, "q4_0"),
        ("q6_k", "bf16", 256, "bf16"),
        ("bf16", "keep", 31, "bf16"),
    ],
)
def test_linear_weights_become_what_was_asked_or_the_nearest(encoding, quant, columns, stored):
    weight = plan_one(encoding, quant, columns=columns)
    assert weight.format == stored
    assert weight.converted == (stored != encoding)


@pytest.mark.parametrize("quant", QUANT_CHOICES)
def test_embeddings_are_kept_and_vectors_are_f32(quant):
    assert plan_one("q6_k", quant, "embedding").format == "q6_k"
    assert plan_one("q3_k", quant, "embedding").format == "q8_0"
    assert plan_one("bf16", quant, "vector").format == "f32"


def test_planes_carry_name_dtype_and_shape():
    assert plan_one("q4_1").planes == {
        "w.d": (np.float16, (1, 8, 16)),
        "w.m": (np.float16, (1, 8, 16)),
        "w.qs": (np.uint8, (1, 8, 4, 16, 4)),
    }
    assert plan_one("q5_k", columns=512).planes == {
        "w.d": (np.float16, (1, 2, 16)),
        "w.dmin": (np.float16, (1, 2, 16)),
        "w.scales": (np.uint8, (1, 2, 12, 16)),
        "w.qh": (np.uint8, (1, 16, 1, 16, 4)),
        "w.qs": (np.uint8, (1, 16, 4, 16, 4)),
    }
    assert plan_one("f32").planes == {"w.w": (np.float32, (8, 256))}
    assert plan_one("bf16", columns=7).planes == {"w.w": (np.dtype(ml_dtypes.bfloat16), (1, 7, 16))}
    assert plan_one("f16", kind="vector", columns=7).planes == {"w": (np.float32, (7,))}


def test_bytes_count_the_rows_that_fill_a_tile():
    assert plan_one("q8_0").nbytes == FORMATS["q8_0"].nbytes(16, 256)
    assert plan_one("q4_k").nbytes == FORMATS["q4_k"].nbytes(16, 256)
    assert plan_one("f32").nbytes == FORMATS["f32"].nbytes(8, 256)
    assert plan_one("f32", kind="vector").nbytes == 4 * 256


def test_missing_tensor_names_three_close_ones():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)]
    listing = Listing(*((name, (8, 32), "f32") for name in names))
    with pytest.raises(ParameterError) as caught:
        plan_weights(listing, [WeightSpec("model.layers.9.mlp.up_proj.weight", (8, 32), "linear")])
    message = str(caught.value)
    assert message.startswith("model.gguf has no tensor model.layers.9.mlp.up_proj.weight; close names: model.layers.")
    assert message.count("up_proj") == 4


def test_missing_tensor_without_a_close_name():
    with pytest.raises(ParameterError, match=r"^model.gguf has no tensor w$"):
        plan_weights(Listing(("unlike", (8, 32), "f32")), [WeightSpec("w", (8, 32), "linear")])


def test_misshapen_tensor_names_both_shapes():
    with pytest.raises(ParameterError, match=r"tensor w has shape \[8, 32\], the model needs \[32, 8\]$"):
        plan_weights(Listing(("w", (8, 32), "f32")), [WeightSpec("w", (32, 8), "linear")])


def test_unreadable_encoding_names_tensor_and_encoding():
    with pytest.raises(SourceError, match="tensor w is stored as f8_e4m3, which holds no weights; readable are bf16"):
        plan_one("f8_e4m3")


def test_unknown_choice_lists_the_valid():
    with pytest.raises(SourceError, match="unknown quantization 'q5_0'; valid are keep, q4_0, q8_0, f16, bf16"):
        plan_one("f32", "q5_0")


def test_a_weight_listed_twice_is_refused():
    spec = WeightSpec("w", (8, 32), "linear")
    with pytest.raises(ParameterError, match="lists tensor w 2 times"):
        plan_weights(Listing(("w", (8, 32), "f32")), [spec, spec])


def test_tensors_that_the_model_does_not_want_are_ignored():
    listing = Listing(("w", (8, 32), "f32"), ("rotary.inv_freq", (4,), "f64"), ("lm_head.weight", (8, 32), "f32"))
    assert len(plan_weights(listing, [WeightSpec("w", (8, 32), "linear")])) == 1


def test_conversions_are_counted_by_pair():
    listing = Listing(("a", (8, 32), "q5_0"), ("b", (8, 32), "q5_0"), ("c", (8, 32), "q4_0"), ("n", (8,), "f16"))
    specs = [WeightSpec(name, (8, 32), "linear") for name in "abc"] + [WeightSpec("n", (8,), "vector")]
    assert describe_conversions(plan_weights(listing, specs)) == ["q5_0 -> q8_0: 2 tensors"]
    assert describe_conversions(plan_weights(listing, specs, "q8_0")) == [
        "q4_0 -> q8_0: 1 tensor",
        "q5_0 -> q8_0: 2 tensors",
    ]


@pytest.mark.parametrize(
    ("shape", "kind"), [((4,), "linear"), ((4, 4), "vector"), ((0, 4), "embedding"), ((4, 4), "conv")]
)
def test_specs_check_themselves(shape, kind):
    with pytest.raises(ValueError, match="w: "):
        WeightSpec("w", shape, kind)


def test_planned_weights_check_themselves():
    with pytest.raises(ValueError, match="no whole blocks of q4_k"):
        PlannedWeight(WeightSpec("w", (8, 32), "linear"), "f32", "q4_k")
    with pytest.raises(ValueError, match="stored as f32, not f16"):
        PlannedWeight(WeightSpec("w", (8,), "vector"), "f16", "f16")
    with pytest.raises(ValueError, match="'q5_0' is none of f32"):
        PlannedWeight(WeightSpec("w", (8, 32), "linear"), "f32", "q5_0")
