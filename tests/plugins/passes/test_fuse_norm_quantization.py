"""fuse-norm-quantization: norms with and without a sum in front, and those that others need as well."""

import re
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
    """The first residual add takes the first norm here, not the embedding."""
    text = llama.phases["decode"]
    [norm, *_] = re.findall(r'"torch.llmir.quantized_matmul"\((%\w+),', text)
    add = r"(torch\.aten\.add\.Tensor )%\w+(, %\w+, %int1 : !torch\.vtensor<\[1,1,128\],f32>)"
    changed, count = re.subn(add, rf"\g<1>{norm}\g<2>", text, count=1)
    assert count == 1
    after = run_passes(changed, SHARE, FUSE)
    assert "norm_quantize" not in after.llmir()
    assert after.counts["torch.aten.rsqrt"] == 1


def test_another_root_stays(llama: Any, run_passes: Callable[..., Any]) -> None:
    text = llama.phases["decode"]
    assert "torch.aten.rsqrt" in text
    after = run_passes(text.replace("torch.aten.rsqrt", "torch.aten.reciprocal"), SHARE, FUSE)
    assert not {"norm_quantize", "add_norm_quantize"} & set(after.llmir())
