"""fuse-norm-quantization: norms with and without a sum in front, and those that others need as well."""

from collections.abc import Callable
from typing import Any

SHARE = "share-quantization"
FUSE = "fuse-norm-quantization"


def test_every_norm_of_a_decode_is_fused(llama: Any, run_passes: Callable[..., Any]) -> None:
    after = run_passes(llama.phases["decode"], SHARE, FUSE)
    # Only the first norm has no sum in front of it: it takes the embedding.
    assert after.llmir()["norm_quantize"] == 1
    assert after.llmir()["add_norm_quantize"] == 4
    assert after.counts["torch.aten.rsqrt"] == after.counts["torch.aten.mean.dim"] == 0
    assert "epsilon = 9.9999999999999995E-7 : f64" in after.text


def test_the_last_norm_of_a_prefill_serves_all_positions(llama: Any, run_passes: Callable[..., Any]) -> None:
    """And the head one of them: what is quantised is a slice of the norm."""
    after = run_passes(llama.phases["prefill"], SHARE, FUSE)
    assert (after.llmir()["norm_quantize"], after.llmir()["add_norm_quantize"]) == (1, 3)
    assert after.counts["torch.aten.rsqrt"] == 1


def test_a_norm_that_others_take_stays(llama: Any, run_passes: Callable[..., Any]) -> None:
    """Without merged weights nothing is shared by these: one matmul of plain weights takes the norm as it is."""
    after = run_passes(llama.phases["decode"], FUSE)
    assert after.counts["torch.aten.rsqrt"] == 5


def test_another_power_stays(llama: Any, run_passes: Callable[..., Any]) -> None:
    text = llama.phases["decode"]
    [square] = {line.split("%")[-1].split(" ")[0] for line in text.splitlines() if "aten.pow.Tensor_Scalar" in line}
    after = run_passes(text.replace("torch.aten.rsqrt", "torch.aten.reciprocal"), SHARE, FUSE)
    assert square
    assert "norm_quantize" not in after.llmir()
