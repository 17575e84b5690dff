"""merge-sibling-matmuls: what becomes one matmul, and what stays apart."""

from collections.abc import Callable
from typing import Any

import pytest

MERGE = "merge-sibling-matmuls"
PER_LAYER = 7


def test_q_k_v_and_gate_up_become_one_each(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["decode"], MERGE, merged=llama.merged)
    # q + k + v, o, gate + up, down of two layers, and the head.
    assert after.llmir()["quantized_matmul"] == 2 * 4 + 1
    assert '"model.layers.0.self_attn.q_proj+k_proj+v_proj.weight.qs"> : tensor<16x4x4x16x4xi8>' in after.text
    assert '"model.layers.1.mlp.gate_proj+up_proj.weight.d"> : tensor<32x4x16xf16>' in after.text
    slices = run_passes(llama.phases["decode"]).counts["torch.aten.slice.Tensor"]
    assert after.counts["torch.aten.slice.Tensor"] == slices + 2 * 5
    # Weights that are read as part of others are not read for themselves.
    loads = [line for line in after.text.splitlines() if "util.global.load" in line]
    assert not [line for line in loads if "q_proj.weight" in line or ("up_proj.weight" in line and "+" not in line)]


@pytest.mark.parametrize(
    "options",
    [{"merged": {}}, {"preference": "portable"}, {"preference": "portable", "target": "cuda"}],
    ids=["archive-without-spans", "portable", "portable-gpu"],
)
def test_nothing_merges_without_kernels_or_spans(
    llama: Any, run_passes: Callable[..., Any], options: dict[str, Any]
) -> None:
    after = run_passes(llama.phases["decode"], MERGE, **{"merged": llama.merged, **options})
    assert after.llmir()["quantized_matmul"] == 2 * PER_LAYER + 1


def test_siblings_of_another_input_stay_apart(llama: Any, run_passes: Callable[..., Any]) -> None:
    """Weights that lie in a row do not make siblings: o_proj takes what attention gives."""
    spans = {"o+down": ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight")}
    after = run_passes(llama.phases["decode"], MERGE, merged=spans)
    assert after.llmir()["quantized_matmul"] == 2 * PER_LAYER + 1
