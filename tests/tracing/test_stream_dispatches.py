"""Dispatches at stream level: how many a step of TinyLlama's shapes takes, with all passes and without one of them."""

from pathlib import Path

import pytest

from llmir_iree.compile import compile_mlir
from llmir_iree.export.model import build_model, load_config, weight_specs
from llmir_iree.export.trace import TraceOptions, trace_phase
from llmir_iree.params.plan import PlannedWeight
from llmir_iree.params.siblings import merge_siblings
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target
from llmir_iree.tracing.stream_dispatches import count_dispatches

LAYERS = 22
TINYLLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def plan() -> tuple[PlannedWeight, ...]:
    formats = {"linear": "q4_0", "embedding": "q4_0", "vector": "f32"}
    return tuple(
        PlannedWeight(spec, "F32", "q6_k" if spec.name == "lm_head.weight" else formats[spec.kind])
        for spec in weight_specs(load_config(TINYLLAMA))
    )


@pytest.fixture(scope="module")
def decode(plan: tuple[PlannedWeight, ...]) -> str:
    config = load_config(TINYLLAMA)
    return trace_phase(build_model(config, plan), config, "decode", TraceOptions((1,), 32, "f16", 2048)).text


def dispatches(decode: str, plan: tuple[PlannedWeight, ...], folder: Path, *passes: str) -> dict[str, int]:
    merged = {weight.name: weight.sibling_names for weight in merge_siblings(plan)}
    target = resolve_target("llvm-cpu:znver4")
    lowered = lower(decode, target, merged=merged, passes=passes)
    output = folder / "stream.mlir"
    compile_mlir(lowered.text, output, (*target.flags, "--compile-to=stream"))
    [counts] = count_dispatches(output.read_text()).values()
    return dict(counts)


def test_a_step_takes_8_dispatches_a_layer(decode: str, plan: tuple[PlannedWeight, ...], tmp_path: Path) -> None:
    counts = dispatches(decode, plan, tmp_path)
    assert {name: count for name, count in counts.items() if count >= LAYERS} == {
        # One of them, the first, has no sum in front of its norm, and the last norm is the head's.
        "llmir_add_norm_quantize_executable": 2 * LAYERS,
        "llmir_quantized_matmul_q4_0_executable": 3 * LAYERS,
        "llmir_rope_append_attend_f16_executable": LAYERS,
        "llmir_merge_attention_quantize_executable": LAYERS,
        "llmir_gated_matmul_q4_0_executable": LAYERS,
    }
    # Embedding, positions and angles, the first norm, the head and the arg-max.
    assert sum(counts.values()) <= 8 * LAYERS + 12


def test_a_pass_that_is_left_out_shows(decode: str, plan: tuple[PlannedWeight, ...], tmp_path: Path) -> None:
    counts = dispatches(decode, plan, tmp_path, "-fuse-attention-quantization")
    assert counts["llmir_merge_attention_executable"] == counts["llmir_quantize_activations_executable"] == LAYERS
    assert "llmir_merge_attention_quantize_executable" not in counts
