"""One small module, recorded once a session: two dispatches, whose sizes a caller decides."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from llmir_iree.cli.trace import main
from llmir_iree.tracing.capture import Capture

TWO_DISPATCHES = """
func.func @main(%a: tensor<256x?xf32>, %b: tensor<?x512xf32>) -> tensor<256x512xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<256x512xf32>
  %init = linalg.fill ins(%zero : f32) outs(%empty : tensor<256x512xf32>) -> tensor<256x512xf32>
  %product = linalg.matmul ins(%a, %b : tensor<256x?xf32>, tensor<?x512xf32>) outs(%init : tensor<256x512xf32>)
      -> tensor<256x512xf32>
  %result = linalg.softmax dimension(1) ins(%product : tensor<256x512xf32>) outs(%empty : tensor<256x512xf32>)
      -> tensor<256x512xf32>
  return %result : tensor<256x512xf32>
}
"""
INPUTS = ("--input", "256x768xf32=1", "--input", "768x512xf32=0.5")
# Behind the last call of a process lies what no later call shows: many calls make that a small part, on fast machines
# as well.
RUNS = 100
PROCESSES = 2


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLIR of a matmul and a softmax."""
    file = tmp_path_factory.mktemp("small") / "small.mlir"
    file.write_text(TWO_DISPATCHES)
    return file


@pytest.fixture(scope="session")
def small_capture(small_text: Path) -> Capture:
    """The same, recorded with IR."""
    output = small_text.with_name("small.llmtrace")
    counts = ("--runs", str(RUNS), "--processes", str(PROCESSES))
    done = CliRunner().invoke(main, ["record", str(small_text), *INPUTS, *counts, "-o", str(output), "--quiet"])
    assert done.exit_code == 0, done.output
    return Capture.open(output)
