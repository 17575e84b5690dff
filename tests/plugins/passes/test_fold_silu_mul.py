"""fold-silu-mul: gate and up in one op that gives codes, if nobody else wants what lies between."""

from collections.abc import Callable
from typing import Any

BEFORE = ("merge-sibling-matmuls", "share-quantization")
FOLD = "fold-silu-mul"


def test_gate_and_up_give_codes(llama: Any, run_passes: Callable[..., Any]) -> None:
    for phase, text in llama.phases.items():
        after = run_passes(text, *BEFORE, FOLD, merged=llama.merged)
        # q + k + v, o and down of two layers, and the head.
        assert after.llmir()["gated_multiply"] == 2, phase
        assert after.llmir()["multiply"] == 2 * 3 + 1
        assert after.counts["torch.aten.silu"] == 0
        [line, _] = [line for line in after.text.splitlines() if "llmir.gated_multiply" in line]
        # 256 columns, whose weights are the halves of 512 rows, as 8 groups of codes.
        assert "out_features = 256 : i64" in line
        assert "[32,4,16],f16" in line


def test_it_needs_the_merged_weights(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["decode"], "share-quantization", FOLD)
    assert "gated_multiply" not in after.llmir()
    assert after.counts["torch.aten.silu"] == 2


def test_another_activation_stays(llama: Any, run_passes: Callable[..., Any]) -> None:
    text = llama.phases["decode"].replace("torch.aten.silu ", "torch.aten.relu ")
    after = run_passes(text, *BEFORE, FOLD, merged=llama.merged)
    assert "gated_multiply" not in after.llmir()
