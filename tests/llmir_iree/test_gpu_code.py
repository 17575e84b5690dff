"""Reports of GPU code, read from what iree-compile makes of a small matmul."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmir_iree import gpu_code
from llmir_iree.compile import compile_mlir
from llmir_iree.gpu_code import (
    KernelCode,
    assemble,
    parse_ptx,
    parse_ptxas,
    parse_rocm_assembly,
    parse_spirv,
    read_code,
    validate_spirv,
)
from llmir_iree.params.errors import CompileError, TargetError
from llmir_iree.targets import resolve_target

# Exported functions are called so. The first dispatch uses matrix instructions where there are some, the second none.
MODULE = """
func.func @"main$async"(%a: tensor<64x256xf16>, %b: tensor<256x64xf16>) -> tensor<64x64xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<64x64xf32>
  %filled = linalg.fill ins(%zero : f32) outs(%empty : tensor<64x64xf32>) -> tensor<64x64xf32>
  %product = linalg.matmul ins(%a, %b : tensor<64x256xf16>, tensor<256x64xf16>)
      outs(%filled : tensor<64x64xf32>) -> tensor<64x64xf32>
  %barrier = util.optimization_barrier %product : tensor<64x64xf32>
  %sum = arith.addf %barrier, %barrier : tensor<64x64xf32>
  return %sum : tensor<64x64xf32>
}
"""
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 4096 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles the module for a target, and gives the folder with its code."""
    done: dict[str, Path] = {}

    def compile_for(name: str) -> Path:
        if name not in done:
            done[name] = folder = tmp_path_factory.mktemp("dump")
            flags = [f"--iree-hal-dump-executable-{kind}-to={folder}" for kind in ("binaries", "intermediates")]
            compile_mlir(MODULE, folder / "module.vmfb", (*resolve_target(name).flags, *flags))
        return done[name]

    return compile_for


@pytest.fixture(scope="module")
def spirv_val() -> None:
    if shutil.which("spirv-val") is None:
        pytest.skip(f"spirv-val is not installed; {gpu_code.SPIRV_VAL_PACKAGE}")


def check(kernels: list[KernelCode], *, has_matrix_instructions: bool) -> None:
    product, total = sorted(kernels, key=lambda kernel: -kernel.instructions)
    assert "matmul" in product.name
    assert "elementwise" in total.name
    assert product.instructions > total.instructions > 3
    assert (product.matrix_instructions > 0) == has_matrix_instructions
    assert total.matrix_instructions == 0


@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_120"])
def test_cuda(dump: Callable[[str], Path], ptxas: str, name: str) -> None:
    kernels = read_code(dump(name), resolve_target(name))
    check(kernels, has_matrix_instructions=True)
    for kernel in kernels:
        assert 8 <= (kernel.registers or 0) <= 255
        # ptxas keeps some registers in memory to let more workgroups run at once.
        assert kernel.spills is not None
        assert kernel.spills <= 32


@pytest.mark.parametrize("later", ["sm_90", "sm_120"])
def test_ptx_of_sm_80_assembles_for_later_chips(dump: Callable[[str], Path], ptxas: str, later: str) -> None:
    for file in dump("cuda:sm_80").glob("*.ptx"):
        names = {kernel.name for kernel in parse_ptx(file.read_text())}
        assert names
        assert set(assemble(file, later)) == names


def test_ptx_that_is_wrong_is_refused(dump: Callable[[str], Path], ptxas: str, tmp_path: Path) -> None:
    text = next(dump("cuda:sm_80").glob("*.ptx")).read_text()
    (tmp_path / "wrong.ptx").write_text(text.replace("ret;", "retreat;"))
    with pytest.raises(CompileError, match="ptxas"):
        assemble(tmp_path / "wrong.ptx", "sm_80")


def test_what_ptxas_says() -> None:
    assert parse_ptxas(PTXAS) == {"one": (72, 48, 4096), "two": (8, 0, 0)}


def test_instructions_of_ptx_are_counted_once_each() -> None:
    body = """.visible .entry one(
\t.param .u64 one_param_0
)
.maxntid 32, 1, 1
{
\t.reg .pred \t%p<2>;
\tld.param.b64 \t%rd1, [one_param_0];
$L__BB0_1:
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
\t\t{%r1, %r2, %r3, %r4},
\t\t{%r5, %r6};
\t@%p1 bra \t$L__BB0_1;
\tret;
}
"""
    assert parse_ptx(body) == [KernelCode("one", 4, 1)]


@pytest.mark.parametrize("name", ["rocm:gfx942", "rocm:gfx1100"])
def test_rocm(dump: Callable[[str], Path], name: str) -> None:
    kernels = read_code(dump(name), resolve_target(name))
    check(kernels, has_matrix_instructions=True)
    for kernel in kernels:
        assert 0 < (kernel.registers or 0) <= 512
        assert kernel.spills == 0
    assert max(kernel.shared_bytes or 0 for kernel in kernels) > 0


def test_spills_of_rocm_are_bytes(dump: Callable[[str], Path]) -> None:
    [text] = [file.read_text() for file in dump("rocm:gfx942").glob("*.rocmasm") if "matmul" in file.read_text()]
    kernels = parse_rocm_assembly(text.replace(".vgpr_spill_count: 0", ".vgpr_spill_count: 7"))
    assert {kernel.spills for kernel in kernels} == {28}


@pytest.mark.parametrize("name", ["vulkan:llvmpipe", "vulkan:rdna3", "metal"])
def test_spirv(dump: Callable[[str], Path], spirv_val: None, name: str) -> None:
    kernels = read_code(dump(name), resolve_target(name))
    check(kernels, has_matrix_instructions=name == "vulkan:rdna3")
    assert {kernel.registers for kernel in kernels} == {None}
    # Matrix instructions may be newer than spirv-val.
    assert all(kernel.is_checked or kernel.matrix_instructions for kernel in kernels)


def test_spirv_that_is_wrong_is_refused(dump: Callable[[str], Path], spirv_val: None, tmp_path: Path) -> None:
    data = bytearray(next(dump("vulkan:llvmpipe").glob("*.spv")).read_bytes())
    data[3 * 4] = 1  # The bound of identifiers.
    data[3 * 4 + 1 : 4 * 4] = bytes(3)
    (tmp_path / "wrong.spv").write_bytes(data)
    with pytest.raises(CompileError, match="spirv-val"):
        validate_spirv(tmp_path / "wrong.spv", "vulkan1.3")
    with pytest.raises(CompileError, match="not a SPIR-V module"):
        parse_spirv(b"nonsense" * 8)


def test_metal_has_its_shaders(dump: Callable[[str], Path], spirv_val: None, tmp_path: Path) -> None:
    for file in dump("metal").glob("*.spv"):
        shutil.copy(file, tmp_path)
    with pytest.raises(CompileError, match=r"no shader in Metal's language for main\$async_dispatch"):
        read_code(tmp_path, resolve_target("metal"))


def test_a_missing_tool_is_named_with_its_package(dump: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(gpu_code.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TargetError, match="ptxas is not installed; pip install nvidia-cuda-nvcc"):
        read_code(dump("cuda:sm_80"), resolve_target("cuda"))
    with pytest.raises(TargetError, match="spirv-val is not installed; Debian: apt-get install spirv-tools"):
        read_code(dump("vulkan:llvmpipe"), resolve_target("vulkan:llvmpipe"))


def test_a_dump_without_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no code for rocm:gfx942"):
        read_code(tmp_path, resolve_target("rocm:gfx942"))


HALF_SUMS = """
func.func @main(%a: tensor<64x256xf16>) -> tensor<64xf16> {
  %zero = arith.constant 0.0 : f16
  %empty = tensor.empty() : tensor<64xf16>
  %filled = linalg.fill ins(%zero : f16) outs(%empty : tensor<64xf16>) -> tensor<64xf16>
  %sums = linalg.generic {
      indexing_maps = [affine_map<(m, k) -> (m, k)>, affine_map<(m, k) -> (m)>],
      iterator_types = ["parallel", "reduction"]}
      ins(%a : tensor<64x256xf16>) outs(%filled : tensor<64xf16>) {
  ^bb0(%number: f16, %sum: f16):
    %next = arith.addf %sum, %number : f16
    linalg.yield %next : f16
  } -> tensor<64xf16>
  return %sums : tensor<64xf16>
}
"""


@pytest.mark.parametrize("name", ["cuda:sm_80", "rocm:gfx942", "rocm:gfx1100", "metal"])
def test_sums_of_16_bit_floats_are_told_from_others(
    dump: Callable[[str], Path], ptxas: str, spirv_val: None, name: str, tmp_path: Path
) -> None:
    target = resolve_target(name)
    flags = [f"--iree-hal-dump-executable-{kind}-to={tmp_path}" for kind in ("binaries", "intermediates")]
    compile_mlir(HALF_SUMS, tmp_path / "module.vmfb", (*target.flags, *flags))
    [kernel] = read_code(tmp_path, target)
    assert kernel.half_sums > 0
    # Matrix instructions of 16-bit floats that add up in float32 are none.
    assert {kernel.half_sums for kernel in read_code(dump(name), target)} == {0}
