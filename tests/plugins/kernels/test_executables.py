"""Which instruction sets are linked for a target, and which of them runs."""

import numpy as np
import pytest
from iree import runtime
from iree.compiler.tools import compile_str

from llmir_iree.params.errors import CompileError
from llmir_iree.params.layouts import pack_tile16
from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.kernels import build
from llmir_iree.plugins.kernels.definitions import quantized_matmul
from llmir_iree.plugins.kernels.executables import Buffer, Kernel, executable, find_variants, read_executable_target
from llmir_iree.targets import resolve_target

AARCH64 = "--iree-llvmcpu-target-triple=aarch64-linux-gnu"


def names_for(cpu, *flags):
    target = resolve_target(f"llvm-cpu:{cpu}")
    return [variant.name for variant in find_variants(read_executable_target((*target.flags, *flags)))]


@pytest.mark.parametrize(
    ("cpu", "flags", "name"),
    [
        ("znver4", (), "x86_64-avx512vnni"),
        ("icelake-server", (), "x86_64-avx512vnni"),
        ("skylake-avx512", (), "x86_64-avx2"),
        ("haswell", (), "x86_64-avx2"),
        ("nehalem", (), "x86_64-generic"),
        ("znver4", ("--iree-llvmcpu-target-cpu-features=-avx512vnni",), "x86_64-avx2"),
        ("neoverse-v1", (AARCH64,), "aarch64-i8mm"),
        ("apple-m1", (AARCH64,), "aarch64-dotprod"),
        ("cortex-a72", (AARCH64,), "aarch64-generic"),
    ],
)
def test_for_a_target_cpu_the_best_that_it_runs_is_linked(cpu, flags, name):
    assert names_for(cpu, *flags) == [name]


def test_for_a_generic_cpu_all_of_its_architecture_are_linked():
    assert names_for("generic") == ["x86_64-avx512vnni", "x86_64-avx2", "x86_64-generic"]
    assert names_for("generic", AARCH64) == ["aarch64-i8mm", "aarch64-dotprod", "aarch64-generic"]


def test_what_is_worse_than_the_least_cpu_is_not_linked():
    features = "--iree-llvmcpu-target-cpu-features=" + ",".join(f"+{f}" for f in build.VARIANTS["x86_64-avx2"].features)
    assert names_for("generic", features) == ["x86_64-avx512vnni", "x86_64-avx2"]


def test_an_architecture_without_kernels_gets_none():
    assert names_for("generic", "--iree-llvmcpu-target-triple=riscv64-linux-gnu") == []


def test_every_variant_runs_on_a_processor_with_its_features():
    for variant in build.VARIANTS.values():
        assert build.choose_variants(variant.architecture, variant.features, is_generic=False) == [variant]


def load(text, flags):
    """The module, compiled."""
    config = runtime.Config("local-task")
    binary = compile_str(text, input_type="none", extra_args=flags)
    return runtime.load_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary), config)


NUMBERS = {"x86_64-avx512vnni": 3, "x86_64-avx2": 2, "x86_64-generic": 1}
WHICH = """
#include "{kernel_h}"
#if defined(__AVX512VNNI__)
enum { NUMBER = 3 };
#elif defined(__AVX2__)
enum { NUMBER = 2 };
#else
enum { NUMBER = 1 };
#endif
KERNEL void which(float* y, size_t offset, size_t count, float scale, size_t x, size_t row, size_t z) {
  y[offset + (z * 2 + row) * count + x] = NUMBER * scale;
}
"""


@pytest.mark.parametrize(
    "linked",
    [
        ("x86_64-avx512vnni", "x86_64-avx2", "x86_64-generic"),
        ("x86_64-avx2", "x86_64-generic"),
        ("x86_64-generic",),
    ],
)
def test_the_best_of_the_linked_that_the_processor_has_runs(linked, runnable, monkeypatch, tmp_path):
    source = tmp_path / "which.c"
    source.write_text(WHICH.replace("{kernel_h}", str(build.SOURCES / "kernel.h")))
    monkeypatch.setattr(build, "sources", lambda: [source])
    objects = {build.VARIANTS[name]: build.build_objects(tmp_path, build.VARIANTS[name])[0] for name in linked}
    kernel = Kernel(
        "which",
        "which",
        (Buffer("f32", writes=True),),
        ("count", "scale", "workgroup_x", "workgroup_y", "workgroup_z"),
        floats=frozenset({"scale"}),
    )
    flags = resolve_target("llvm-cpu:generic").flags
    text = (
        executable(kernel, read_executable_target(flags), objects)
        + f"""
util.func public @main() -> tensor<3x2x5xf32> {{
  %c2 = arith.constant 2 : index
  %c3 = arith.constant 3 : index
  %c5 = arith.constant 5 : index
  %count = arith.constant 5 : i32
  %scale = arith.constant 0x3FC00000 : i32  // 1.5
  %y = flow.dispatch {kernel.entry}[%c5, %c2, %c3](%count, %scale) : (i32, i32) -> tensor<3x2x5xf32>
  util.return %y : tensor<3x2x5xf32>
}}"""
    )
    expected = next(NUMBERS[name] for name in linked if name in runnable)
    assert (load(text, flags).main().to_host() == expected * 1.5).all()


def test_a_module_for_a_generic_cpu_gives_what_one_for_this_cpu_gives():
    columns, depth = 41, 97
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, depth)).astype(np.float32)
    (w,) = pack_tile16("f16", {"w": rng.standard_normal((columns, depth)).astype(np.float16)}).values()
    operands, y = (TensorType(x.shape, "f32"), TensorType(w.shape, "f16")), TensorType((2, 5, columns), "f32")
    call = LlmirCall(
        "quantized_matmul", operands, (y,), (("format", "f16"), ("layout", "tile16"), ("out_features", columns))
    )
    results = []
    for target in (resolve_target("llvm-cpu"), resolve_target("llvm-cpu:generic")):
        definitions = "\n".join(quantized_matmul(call, target).values())
        main = f"""
util.func public @main(%x: {operands[0]}, %w: {operands[1]}) -> {y} {{
  %y = util.call @{call.symbol}(%x, %w) : ({operands[0]}, {operands[1]}) -> {y}
  util.return %y : {y}
}}"""
        results.append(load(definitions + main, target.flags).main(x, w).to_host())
    np.testing.assert_array_equal(*results)


def test_flags_that_the_compiler_refuses_are_shown():
    with pytest.raises(CompileError, match=r"(?s)no-such-flag.*repeat with: .* --compile-to=flow --no-such-flag"):
        read_executable_target(("--no-such-flag",))
