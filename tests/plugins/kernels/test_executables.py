import pytest

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.kernels.build import VARIANTS, choose_variant
from llmir_iree.plugins.kernels.executables import read_executable_target, read_processor
from llmir_iree.targets import resolve_target


def variant_for(*flags):
    variant = choose_variant(*read_processor(read_executable_target((*resolve_target("llvm-cpu").flags, *flags))))
    return variant and variant.name


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--iree-llvmcpu-target-cpu=znver4",), "x86_64-avx512vnni"),
        (("--iree-llvmcpu-target-cpu=icelake-server",), "x86_64-avx512vnni"),
        (("--iree-llvmcpu-target-cpu=skylake-avx512",), "x86_64-avx2"),
        (("--iree-llvmcpu-target-cpu=haswell",), "x86_64-avx2"),
        (("--iree-llvmcpu-target-cpu=nehalem",), "x86_64-generic"),
        (("--iree-llvmcpu-target-cpu=generic",), "x86_64-generic"),
        (("--iree-llvmcpu-target-cpu=znver4", "--iree-llvmcpu-target-cpu-features=-avx512vnni"), "x86_64-avx2"),
        (("--iree-llvmcpu-target-cpu=", "--iree-llvmcpu-target-triple=aarch64-linux-gnu"), "aarch64-generic"),
        (("--iree-llvmcpu-target-cpu=", "--iree-llvmcpu-target-triple=riscv64-linux-gnu"), None),
    ],
)
def test_the_variant_is_what_the_target_cpu_runs(flags, name):
    assert variant_for(*flags) == name


def test_every_variant_runs_on_a_processor_with_its_features():
    for variant in VARIANTS.values():
        assert choose_variant(variant.architecture, variant.features) == variant


def test_flags_that_the_compiler_refuses_are_shown():
    with pytest.raises(CompileError, match="names no executable target for --no-such-flag"):
        read_executable_target(("--no-such-flag",))
