"""A program of two dispatches, and what iree-compile prints of it in every way that it can print."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from iree.compiler.tools.binaries import find_tool

from llmir_iree.cli.trace import main
from tests.tracing.tuning import bad_tiles

PROGRAM = """
module @small {
  func.func @main(%x: tensor<8x64xf32>, %w: tensor<64x64xf32>) -> tensor<8x64xf32> {
    %zero = arith.constant 0.0 : f32
    %empty = tensor.empty() : tensor<8x64xf32>
    %fill = linalg.fill ins(%zero : f32) outs(%empty : tensor<8x64xf32>) -> tensor<8x64xf32>
    %product = linalg.matmul ins(%x, %w : tensor<8x64xf32>, tensor<64x64xf32>)
                             outs(%fill : tensor<8x64xf32>) -> tensor<8x64xf32>
    %soft = linalg.softmax dimension(1) ins(%product : tensor<8x64xf32>)
                                        outs(%empty : tensor<8x64xf32>) -> tensor<8x64xf32>
    return %soft : tensor<8x64xf32>
  }
}
"""
TARGET = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")
# The choice of tile sizes depends on it, so the tests must not depend on the machine that they run on.
CPU = "--iree-llvmcpu-target-cpu=x86-64-v4"
# With threads, iree-compile 3.13 was seen to hang while it writes a folder.
TREE = ("--mlir-print-ir-tree-dir={}/tree", "--mlir-disable-threading")

MATMUL = "main_dispatch_0_matmul_8x64x64_f32"
SOFTMAX = "main_dispatch_1_softmax_8x64xf32_dispatch_tensor_store"

Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile it with more flags; `{}` in one of them is a folder, which is given back, with `log` in it of stderr."""
    compiler = str(Path(find_tool("iree-compile")).resolve())
    source = tmp_path_factory.mktemp("program") / "small.mlir"
    source.write_text(PROGRAM)

    def run(*flags: str, cpu: str = CPU) -> Path:
        folder = tmp_path_factory.mktemp("ir")
        command = [compiler, str(source), "-o", str(folder / "small.vmfb"), *TARGET, cpu]
        with (folder / "log").open("wb") as log:
            flags = tuple(flag.format(folder) for flag in flags)
            subprocess.run([*command, *flags], stderr=log, timeout=300, check=True)
        return folder

    return run


@pytest.fixture(scope="session")
def tree(compile_program: Compile) -> Path:
    return compile_program("--mlir-print-ir-after-all", *TREE) / "tree"


@pytest.fixture(scope="session")
def changes(compile_program: Compile) -> Path:
    """A folder of those passes alone that changed something."""
    return compile_program("--mlir-print-ir-after-all", "--mlir-print-ir-after-change", *TREE) / "tree"


@pytest.fixture(scope="session")
def threaded_log(compile_program: Compile) -> Path:
    return compile_program("--mlir-print-ir-after-all") / "log"


@pytest.fixture(scope="session")
def log(compile_program: Compile) -> Path:
    """A log of the same."""
    return compile_program("--mlir-print-ir-after-all", "--mlir-print-ir-after-change") / "log"


@pytest.fixture(scope="session")
def badly_tiled(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `changes`, of the program with bad tiles for its matmul."""
    spec = tmp_path_factory.mktemp("spec") / "spec.mlir"
    spec.write_text(bad_tiles("linalg.matmul", "tensor<64x64xf32>", "[2, 4, 0]"))
    flags = ("--mlir-print-ir-after-all", "--mlir-print-ir-after-change", *TREE)
    return compile_program(*flags, f"--iree-codegen-tuning-spec-path={spec}") / "tree"


def invoke(*arguments: str | Path) -> Result:
    """Run llmir-trace."""
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="llmir-trace")
