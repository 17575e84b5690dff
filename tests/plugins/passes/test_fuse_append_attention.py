"""fuse-append-attention: what is fused in a decode and in a prefill, and which graphs it does not take."""

from collections.abc import Callable
from typing import Any

import pytest

FUSE = "fuse-append-attention"
MERGE = "merge-sibling-matmuls"


def test_a_decode_has_one_op_a_layer(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["decode"], MERGE, FUSE, merged=llama.merged)
    assert after.llmir() == {"quantized_matmul": 9, "rope_append_attend": 2}
    for layer in range(2):
        [line] = [line for line in after.text.splitlines() if f"layer = {layer} : i64" in line]
        # q, k and v are columns of one tensor of 128 + 64 + 64.
        for constant in ("heads = 4", "kv_heads = 2", "q_first = 0", "k_first = 128", "v_first = 192", "window = 0"):
            assert f"{constant} : i64" in line
        assert line.count("!torch.vtensor<[1,1,256],f32>") == 3
    # The rotary embedding of queries and keys went along; its factors, which all layers share, stay.
    assert after.counts["torch.aten.neg"] == after.counts["torch.aten.transpose.int"] == 0
    assert after.counts["torch.aten.cos"] == after.counts["torch.aten.sin"] == 1


def test_a_prefill_appends_before_it_attends(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["prefill"], FUSE)
    assert after.llmir() == {"quantized_matmul": 15, "rope_append": 2, "rope_attend": 2}
    lines = [line for line in after.text.splitlines() if "llmir.rope_" in line]
    assert [line.split("llmir.")[1].split('"')[0] for line in lines] == ["rope_append", "rope_attend"] * 2
    # Nothing is merged: heads begin at the first column.
    assert all("_first = 0 : i64" in line for line in lines)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_windows_biases_and_head_norms(
    model_type: str, trace_model: Callable[..., Any], run_passes: Callable[..., Any]
) -> None:
    options = {"sliding_window": 12} if model_type == "mistral" else {}
    after = run_passes(trace_model(model_type, **options).phases["decode"], FUSE)
    if model_type == "qwen3":  # Its norms stand between the projections and the heads' transposition.
        assert after.llmir() == {"quantized_matmul": 15, "append_kv": 2, "paged_attention": 2}
    else:
        assert after.llmir() == {"quantized_matmul": 15, "rope_append_attend": 2}
        assert f"window = {options.get('sliding_window', 0)} : i64" in after.text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Half of the head is the middle of it, and rotated, not mirrored.
        ("torch.aten.neg ", "torch.aten.abs "),
        ("torch.aten.cos ", "torch.aten.exp "),
    ],
)
def test_only_the_rotary_embedding_is_taken_for_one(
    old: str, new: str, llama: Any, run_passes: Callable[..., Any]
) -> None:
    text = llama.phases["decode"]
    assert old in text
    after = run_passes(text.replace(old, new), FUSE)
    # Whatever the factors are, they are operands; but the negated half belongs to the pattern.
    expected = {"append_kv": 2, "paged_attention": 2} if "neg" in old else {"rope_append_attend": 2}
    assert after.llmir() == {"quantized_matmul": 15, **expected}


def test_nothing_is_fused_without_kernels(llama: Any, run_passes: Callable[..., Any]) -> None:
    for options in ({"preference": "portable"}, {"target": "vulkan"}):
        after = run_passes(llama.phases["decode"], FUSE, **options)
        assert after.llmir() == {"quantized_matmul": 15, "append_kv": 2, "paged_attention": 2}
