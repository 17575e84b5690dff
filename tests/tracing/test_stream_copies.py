"""Copies at stream level: one that the compiler has to make is found, and a bundle's modules have none of the cache."""

from pathlib import Path
from typing import Any

import pytest

from llmir_iree.bundle import PHASES, Bundle
from llmir_iree.compile import compile_mlir
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target
from llmir_iree.tracing.stream_copies import find_copies

# A reader between two writes: a second consumer of the first version, which the compiler keeps by copying.
SECOND_READER = """
func.func @main(%cache: tensor<?x64xf16>, %row: tensor<1x64xf16>)
    -> (tensor<?x64xf16>, tensor<?x64xf16>, tensor<?x64xf16>) {
  %c0 = arith.constant 0 : index
  %rows = tensor.dim %cache, %c0 : tensor<?x64xf16>
  %init = tensor.empty(%rows) : tensor<?x64xf16>
  %first = tensor.insert_slice %row into %cache[1, 0] [1, 64] [1, 1] : tensor<1x64xf16> into tensor<?x64xf16>
  %read_first = linalg.elementwise <exp> ins(%first : tensor<?x64xf16>) outs(%init : tensor<?x64xf16>)
      -> tensor<?x64xf16>
  %second = tensor.insert_slice %row into %first[2, 0] [1, 64] [1, 1] : tensor<1x64xf16> into tensor<?x64xf16>
  %read_second = linalg.elementwise <exp> ins(%second : tensor<?x64xf16>) outs(%init : tensor<?x64xf16>)
      -> tensor<?x64xf16>
  return %read_first, %read_second, %second : tensor<?x64xf16>, tensor<?x64xf16>, tensor<?x64xf16>
}
"""


def stream_ir(text: str, folder: Path) -> str:
    output = folder / "stream.mlir"
    compile_mlir(text, output, (*resolve_target("llvm-cpu").flags, "--compile-to=stream"))
    return output.read_text()


def test_finds_a_copy_of_a_whole_argument(tmp_path: Path) -> None:
    copies = find_copies(stream_ir(SECOND_READER, tmp_path))
    assert "tensor<?x64xf16>" in [copy.whole_argument for copy in copies]
    assert 128 in [copy.nbytes for copy in copies]


# On a CPU, "kernels" is "best": tests of whole models say so.
@pytest.mark.parametrize("implementations", ["portable", "best"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_bundle_copies_no_cache(smollm2_bundle: Bundle, phase: Any, implementations: Any, tmp_path: Path) -> None:
    portable = smollm2_bundle.path(smollm2_bundle.manifest.portable[phase].file).read_text()
    merged = smollm2_bundle.manifest.parameters.merged
    text = stream_ir(lower(portable, resolve_target("llvm-cpu"), implementations, merged=merged).text, tmp_path)
    assert "tensor<?x30x2x3x32x64xf16>" in text
    assert [copy for copy in find_copies(text) if copy.whole_argument] == []
