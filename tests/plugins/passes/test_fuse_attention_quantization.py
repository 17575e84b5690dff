"""fuse-attention-quantization: the codes of a decode's attention."""

from collections.abc import Callable
from typing import Any

BEFORE = ("fuse-append-attention", "share-quantization")
FUSE = "fuse-attention-quantization"


def test_the_attention_of_a_decode_gives_codes(llama: Any, run_passes: Callable[..., Any]) -> None:
    before = run_passes(llama.phases["decode"], *BEFORE)
    after = run_passes(llama.phases["decode"], *BEFORE, FUSE)
    assert after.llmir()["rope_append_attend"] == 2
    assert after.llmir()["quantize_activations"] == before.llmir()["quantize_activations"] - 2
    lines = [line for line in after.text.splitlines() if "llmir.rope_append_attend" in line]
    assert all("ui8>" in line.rpartition("->")[2] for line in lines)


def test_that_of_a_prefill_does_not(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["prefill"], *BEFORE, FUSE)
    assert after.llmir() == run_passes(llama.phases["prefill"], *BEFORE).llmir()


def test_a_head_that_is_no_whole_number_of_groups_stays(
    trace_model: Callable[..., Any], run_passes: Callable[..., Any]
) -> None:
    text = trace_model(head_dim=16).phases["decode"]
    assert run_passes(text, *BEFORE, FUSE).llmir() == run_passes(text, *BEFORE).llmir()
