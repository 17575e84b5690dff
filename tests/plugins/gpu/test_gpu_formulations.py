"""Forms of ops that the compiler makes dispatches of: what they compute, on the CPU, and what GPUs are given."""

import re
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import pytest
import torch

from llmir_iree.compile import compile_mlir
from llmir_iree.gpu_code import KernelCode, read_code
from llmir_iree.plugins.calls import TensorType
from llmir_iree.plugins.gpu import formulations
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.seam import choose
from llmir_iree.targets import resolve_target
from tests.plugins.gpu.conftest import load, module_of
from tests.plugins.gpu.weights import TILED, make_weights, matmul_call

ROW_FORMATS = ["f16", "bf16", "q4_0", "q4_1", "q8_0"]
MATRIX_INSTRUCTIONS = {
    "cuda:sm_80": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32",
    "rocm:gfx942": r"v_mfma_f32_\w+",
    "rocm:gfx1100": r"v_wmma_f32_\w+",
}


@pytest.mark.parametrize("name", TILED)
def test_a_matrix_form_is_exact_but_for_16_bit_operands(name: str, tmp_path: Path) -> None:
    batch, seq, columns, depth = 2, 16, 33, 256
    planes, exact = make_weights(name, columns, depth)
    call = matmul_call(name, TensorType((batch, seq, depth), "f32"), planes, columns)
    # Written for a GPU, but nothing in it is of one.
    definition = formulations.quantized_matmul(call, resolve_target("cuda"))
    text = module_of(
        "llvm-cpu", [(call, range(len(call.operands)))], call.operands, [len(call.operands)], lambda *_: definition
    )
    run = load(text, "llvm-cpu", rt.get_device("local-sync"), tmp_path)
    x = torch.randn(batch, seq, depth, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 1e6  # more than a float16 holds
    (y,) = run(x, *planes)
    unit = 2.0**-8 if name == "bf16" else 2.0**-11
    held = x.numpy().astype(np.float64) if name == "bf16" else np.clip(x.numpy().astype(np.float64), -65504, 65504)
    # Both sides are rounded by half a unit in the last place of 16 bits; sums in float32 add next to nothing.
    bound = (2 * unit + unit**2 + 1e-5) * (np.abs(held) @ np.abs(exact).T)
    assert (np.abs(y - held @ exact.T) <= bound).all()


@pytest.mark.parametrize("target", MATRIX_INSTRUCTIONS)
@pytest.mark.parametrize("name", TILED)
def test_one_dispatch_unpacks_and_multiplies_with_matrix_instructions(target: str, name: str, tmp_path: Path) -> None:
    planes, _ = make_weights(name, 192, 256)
    call = matmul_call(name, TensorType((1, 128, 256), "f32"), planes, 192)
    assert choose(call, Lowering(resolve_target(target))).name == "gpu-matrix"
    text = module_of(target, [(call, range(len(call.operands)))], call.operands, [len(call.operands)])
    dumps = ("--iree-hal-dump-executable-binaries-to=", "--iree-hal-dump-executable-intermediates-to=")
    flags = (*resolve_target(target).flags, *(f"{flag}{tmp_path}" for flag in dumps))
    compile_mlir(text, tmp_path / "module.vmfb", flags)
    code = "\n".join(file.read_text() for file in tmp_path.iterdir() if file.suffix in (".ptx", ".rocmasm"))
    assert re.search(MATRIX_INSTRUCTIONS[target], code)
    # One that rounds x, and the product.
    assert len(set(re.findall(r"main_dispatch_\d+", code))) == 2
    assert not re.findall(r"_spill_count: +[1-9]", code)


@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_120"])
@pytest.mark.parametrize("name", ["q4_0", "q6_k"])
def test_registers_hold_the_tiles_of_deep_products(target: str, name: str, ptxas: str, tmp_path: Path) -> None:
    planes, _ = make_weights(name, 2048, 2048)
    call = matmul_call(name, TensorType((1, 128, 2048), "f32"), planes, 2048)
    text = module_of(target, [(call, range(len(call.operands)))], call.operands, [len(call.operands)])
    dumps = ("--iree-hal-dump-executable-binaries-to=", "--iree-hal-dump-executable-intermediates-to=")
    flags = (*resolve_target(target).flags, *(f"{flag}{tmp_path}" for flag in dumps))
    compile_mlir(text, tmp_path / "module.vmfb", flags)
    product = max(read_code(tmp_path, resolve_target(target)), key=lambda kernel: kernel.instructions)
    assert product.matrix_instructions
    assert product.spills == 0


def compile_few_rows(name: str, rows: int, target: str, folder: Path) -> tuple[list[KernelCode], str]:
    """A matmul of a few rows in the form that the compiler is told how to share out: its dispatches, and their text."""
    planes, _ = make_weights(name, 576, 576)
    call = matmul_call(name, TensorType((rows, 1, 576), "f32"), planes, 576)
    emit = choose(call, Lowering(resolve_target(target), "formulations")).emit
    text = module_of(target, [(call, range(len(call.operands)))], call.operands, [len(call.operands)], emit)
    dumps = ("--iree-hal-dump-executable-binaries-to=", "--iree-hal-dump-executable-intermediates-to=")
    flags = (*resolve_target(target).flags, *(f"{flag}{folder}" for flag in dumps))
    compile_mlir(text, folder / "module.vmfb", flags)
    code = "\n".join(file.read_text() for file in folder.iterdir() if file.suffix in (".ptx", ".rocmasm"))
    return read_code(folder, resolve_target(target)), code


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_few_rows_are_exact(name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, depth = 33, 256
    planes, exact = make_weights(name, columns, depth)
    call = matmul_call(name, TensorType((rows, 1, depth), "f32"), planes, columns)
    # Only how lanes share it is of a GPU.
    monkeypatch.setattr(formulations, "_subgroups", lambda *_: {"subgroups": 0, "subgroup": 0})
    definition = formulations.multiply_few_rows(call, resolve_target("cuda"))
    text = module_of(
        "llvm-cpu", [(call, range(len(call.operands)))], call.operands, [len(call.operands)], lambda *_: definition
    )
    run = load(text, "llvm-cpu", rt.get_device("local-sync"), tmp_path)
    x = torch.randn(rows, 1, depth, generator=torch.Generator().manual_seed(0))
    (y,) = run(x, *planes)
    expected = x.numpy().astype(np.float64) @ exact.T
    # As kernels are held to it in test_gpu_matmul.
    assert (np.abs(y - expected) <= 4e-6 * (np.abs(x.numpy()) @ np.abs(exact).T)).all()


@pytest.mark.parametrize(
    ("name", "target", "rows"),
    [
        ("q4_1", "cuda:sm_80", 1),
        ("q4_1", "cuda:sm_80", 8),
        ("q8_0", "cuda:sm_90", 4),
        ("q8_0", "rocm:gfx1100", 1),
        ("q4_0", "rocm:gfx1100", 8),
        ("f16", "cuda:sm_80", 1),
    ],
)
def test_few_rows_are_one_dispatch_without_idle_lanes(
    name: str, target: str, rows: int, ptxas: str, tmp_path: Path
) -> None:
    [kernel], code = compile_few_rows(name, rows, target, tmp_path)
    assert kernel.spills == 0
    if "cuda" in target:
        # A lane reads 8 columns of each row of x, and of 4 rows of weights the codes, factors and minima, all as words
        # of 4 registers, and each once.
        weights = {"q4_1": 3, "q8_0": 3, "f16": 8}[name]
        loads = re.findall(r"ld\.global\.[\w.]+", code)
        assert len(loads) == 2 * rows + weights
        assert all(".v4." in load for load in loads)
        assert "shfl.sync" in code
    else:
        assert re.search(r"_dpp|v_permlane|ds_bpermute|ds_swizzle", code)


@pytest.mark.parametrize(
    ("name", "target", "rows", "compilers"),
    [
        ("q4_0", "cuda:sm_80", 8, "gpu-lanes"),
        ("q4_0", "cuda:sm_80", 9, "gpu-kernels"),
        ("q4_k", "cuda:sm_80", 1, "gpu-kernels"),
        ("q4_0", "rocm:gfx1100", 1, "gpu-lanes"),
        ("q4_0", "rocm:gfx942", 1, "gpu-lanes"),
        ("q4_0", "metal", 1, "gpu-kernels"),
    ],
)
def test_few_rows_are_the_kernels_unless_asked_for(name: str, target: str, rows: int, compilers: str) -> None:
    planes, _ = make_weights(name, 64, 256)
    call = matmul_call(name, TensorType((rows, 1, 256), "f32"), planes, 64)
    assert choose(call, Lowering(resolve_target(target))).name == "gpu-kernels"
    assert choose(call, Lowering(resolve_target(target), "formulations")).name == compilers


@pytest.mark.parametrize(
    ("target", "rows", "chosen"),
    [
        ("cuda:sm_80", 128, "gpu-matrix"),
        ("cuda:sm_75", 128, "gpu-kernels"),
        ("cuda:sm_80", 8, "gpu-kernels"),
        ("cuda:sm_80", None, "gpu-kernels"),
        ("metal", 128, "gpu-kernels"),
        ("vulkan:ampere", 128, "gpu-kernels"),
    ],
)
def test_matrix_instructions_want_a_known_number_of_rows(target: str, rows: Any, chosen: str) -> None:
    planes, _ = make_weights("q4_0", 64, 64)
    call = matmul_call("q4_0", TensorType((1, rows, 64), "f32"), planes, 64)
    assert choose(call, Lowering(resolve_target(target))).name == chosen
    assert choose(call, Lowering(resolve_target(target), "kernels")).name == "gpu-kernels"
