"""split-argmax: which arg-maxes it takes, and that the two reductions find the same index."""

from pathlib import Path

import iree.runtime as rt
import numpy as np
import pytest
from iree.compiler import ir

from llmir_iree.compile import compile_mlir
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.passes.split_argmax import split_argmax
from llmir_iree.targets import resolve_target

ARGMAX = """
func.func @main(%x: !torch.vtensor<[3,96],f32>) -> !torch.vtensor<[3],si64> {
  %dim = torch.constant.int -1
  %keep = torch.constant.bool false
  %i = torch.aten.argmax %x, %dim, %keep
    : !torch.vtensor<[3,96],f32>, !torch.int, !torch.bool -> !torch.vtensor<[3],si64>
  return %i : !torch.vtensor<[3],si64>
}
"""


def split(text: str, target: str) -> str:
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        split_argmax(module, Lowering(resolve_target(target)))
        module.operation.verify()
        return str(module)


@pytest.mark.parametrize("target", ["cuda", "rocm"])
def test_calls_one_definition_on_gpus(target: str) -> None:
    after = split(ARGMAX, target)
    assert "torch.aten.argmax" not in after
    assert after.count("util.call @llmir_argmax_3x96") == 1
    assert after.count("util.func private @llmir_argmax_3x96") == 1


@pytest.mark.parametrize("target", ["llvm-cpu", "vulkan", "metal"])
def test_leaves_other_targets_alone(target: str) -> None:
    assert "torch.aten.argmax" in split(ARGMAX, target)


def test_leaves_other_shapes_alone() -> None:
    dynamic = ARGMAX.replace("[3,96]", "[?,96]").replace("[3]", "[?]")
    assert "torch.aten.argmax" in split(dynamic, "cuda")


def test_finds_the_first_largest(tmp_path: Path) -> None:
    """The definition is portable, so the CPU can answer for the GPUs."""
    file = tmp_path / "module.vmfb"
    compile_mlir(split(ARGMAX, "cuda"), file, resolve_target("llvm-cpu").flags)
    module = rt.load_vm_flatbuffer_file(str(file), driver="local-sync")
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    x[0, [5, 40]] = 9.0
    x[1, 95] = 7.0
    x[2, 0] = np.inf
    assert module.main(x).to_host().tolist() == [5, 95, 0]
