"""What the seam chooses, and that a lowering says so."""

import re
from pathlib import Path

import pytest
import torch
from iree.turbine import aot

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.compile import compile_mlir
from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.pipeline import lower
from llmir_iree.plugins.seam import choose
from llmir_iree.targets import resolve_target


class Siblings(torch.nn.Module):
    """Two matmuls of one x, with weights of different height."""

    def forward(self, x: torch.Tensor, d: torch.Tensor, qs: torch.Tensor, d2: torch.Tensor, qs2: torch.Tensor):
        matmul = torch.ops.llmir.quantized_matmul
        return matmul(x, [d, qs], "q8_0", "tile16", 40), matmul(x, [d2, qs2], "q8_0", "tile16", 16)


@pytest.fixture(scope="module")
def siblings() -> str:
    planes = [
        plane
        for tiles in (3, 1)
        for plane in (
            torch.zeros(tiles, 2, 16, dtype=torch.float16),
            torch.zeros(tiles, 2, 8, 16, 4, dtype=torch.int8),
        )
    ]
    return str(aot.export(torch.export.export(Siblings(), (torch.zeros(1, 1, 64), *planes))).mlir_module)


@pytest.mark.parametrize(
    ("target", "preference", "chosen"),
    [
        ("llvm-cpu:znver4", "best", "cpu-kernels"),
        ("llvm-cpu:generic", "best", "cpu-kernels"),
        ("llvm-cpu:znver4", "portable", "portable-fused"),
        ("cuda", "best", "gpu-kernels"),
        ("cuda", "kernels", "gpu-kernels"),
        ("cuda", "formulations", "gpu-lanes"),
        ("cuda", "portable", "portable-fused"),
        ("metal", "best", "gpu-kernels"),
        ("metal", "formulations", "gpu-kernels"),
        ("llvm-cpu:znver4", "formulations", "cpu-kernels"),
        ("vulkan", "best", "gpu-kernels"),
        ("vulkan", "portable", "portable"),
    ],
)
def test_the_best_that_serves_is_chosen(siblings: str, target: str, preference: str, chosen: str) -> None:
    lowered = lower(siblings, resolve_target(target), preference, passes=["lower-llmir-ops"])
    assert lowered.implementations == {"quantized_matmul": {chosen: 2}}


@pytest.mark.parametrize(
    ("cache", "head_dim", "chosen"), [("f16", 256, True), ("bf16", 64, True), ("f32", 64, False), ("f16", 257, False)]
)
def test_kernels_attend_over_a_16_bit_cache_with_heads_up_to_256(cache: str, head_dim: int, chosen: bool) -> None:
    tokens, pages = (1, None, 4, head_dim), (None, 2, 2, 4, 8, head_dim)
    types = (TensorType(tokens, "f32"), TensorType(pages, cache), TensorType((1, None), "i32"))
    constants = (("layer", 0), ("scale", 1.0), ("window", 0), ("softcap", 0.0))
    call = LlmirCall("paged_attention", (*types, types[2]), types[:2], constants)
    implementation = choose(call, Lowering(resolve_target("llvm-cpu:znver4"), "best"))
    assert implementation.name == ("cpu-kernels" if chosen else "portable")
    on_gpu = choose(call, Lowering(resolve_target("cuda"), "best"))
    assert on_gpu.name == ("portable" if head_dim > 256 else "gpu-kernels")


def test_siblings_share_the_executables_of_their_kernels(siblings: str) -> None:
    text = lower(siblings, resolve_target("llvm-cpu:znver4"), "best").text
    assert text.count("hal.executable private") == 2
    assert text.count("x86_64-avx512vnni/quantized_matmul.o") == 1


def test_siblings_share_the_quantisation_of_their_input(siblings: str, tmp_path: Path) -> None:
    target = resolve_target("llvm-cpu")
    output = tmp_path / "stream.mlir"
    compile_mlir(lower(siblings, target, "best").text, output, (*target.flags, "--compile-to=stream"))
    dispatches = re.findall(r"stream.cmd.dispatch @(\w+)_executable", output.read_text())
    assert sorted(dispatches) == ["llmir_quantize_activations", *["llmir_quantized_matmul_q8_0"] * 2]


def test_an_unknown_preference_is_refused(siblings: str) -> None:
    with pytest.raises(
        CompileError, match="unknown implementations 'fastest'; known: best, kernels, formulations, portable"
    ):
        lower(siblings, resolve_target("llvm-cpu"), "fastest")
