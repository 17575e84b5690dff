"""share-quantization: one quantisation an input."""

from collections.abc import Callable
from typing import Any

SHARE = "share-quantization"


def test_matmuls_of_one_input_share_its_codes(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["prefill"], SHARE)
    # The inputs of q, k, v; of o; of gate, up; of down, in two layers, and that of the head.
    assert after.llmir()["quantize_activations"] == 2 * 4 + 1
    assert after.llmir()["multiply"] == 2 * 7 + 1
    assert "quantized_matmul" not in after.llmir()


def test_the_last_position_of_a_decode_is_all_there_is(llama: Any, run_passes: Callable[..., Any]) -> None:
    """The head of a decode takes the norm itself, not a slice of it; that of a prefill takes one of many positions."""
    slices = {phase: run_passes(llama.phases[phase], SHARE).counts["torch.aten.slice.Tensor"] for phase in llama.phases}
    before = {phase: run_passes(llama.phases[phase]).counts["torch.aten.slice.Tensor"] for phase in llama.phases}
    assert slices["prefill"] == before["prefill"]
    assert slices["decode"] < before["decode"]


def test_plain_weights_take_floats(trace_model: Callable[..., Any], run_passes: Callable[..., Any]) -> None:
    text = trace_model(weight_format="f16").phases["decode"]
    assert run_passes(text, SHARE).llmir() == run_passes(text).llmir()
