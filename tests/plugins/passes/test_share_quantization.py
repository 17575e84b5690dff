"""share-quantization: one quantisation an input, two terms where attention asks for them."""

from collections.abc import Callable
from typing import Any

SHARE = "share-quantization"
MERGE = "merge-sibling-matmuls"


def terms(text: str, op: str) -> list[int]:
    return [int(line.split("terms = ")[1].split(" ")[0]) for line in text.splitlines() if f'"torch.llmir.{op}"' in line]


def test_matmuls_of_one_input_share_its_codes(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["prefill"], SHARE)
    # The inputs of q, k, v; of o; of gate, up; of down, in two layers, and that of the head.
    assert after.llmir()["quantize_activations"] == 2 * 4 + 1
    assert after.llmir()["multiply"] == 2 * 7 + 1
    assert "quantized_matmul" not in after.llmir()


def test_what_attention_takes_is_quantised_to_two_terms(llama: Any, run_passes: Callable[..., Any]) -> None:
    for names in ((SHARE,), ("fuse-append-attention", SHARE), (MERGE, SHARE)):
        after = run_passes(llama.phases["decode"], *names, merged=llama.merged)
        assert terms(after.text, "quantize_activations") == [2, 1, 1, 1, 2, 1, 1, 1, 1]
        products = terms(after.text, "multiply")
        assert sum(products) - len(products) == (2 if MERGE in names else 6)


def test_the_last_position_of_a_decode_is_all_there_is(llama: Any, run_passes: Callable[..., Any]) -> None:
    """The head of a decode takes the norm itself, not a slice of it; that of a prefill takes one of many positions."""
    slices = {phase: run_passes(llama.phases[phase], SHARE).counts["torch.aten.slice.Tensor"] for phase in llama.phases}
    before = {phase: run_passes(llama.phases[phase]).counts["torch.aten.slice.Tensor"] for phase in llama.phases}
    assert slices["prefill"] == before["prefill"]
    assert slices["decode"] < before["decode"]


def test_plain_weights_take_floats(trace_model: Callable[..., Any], run_passes: Callable[..., Any]) -> None:
    text = trace_model(weight_format="f16").phases["decode"]
    assert run_passes(text, SHARE).llmir() == run_passes(text).llmir()
