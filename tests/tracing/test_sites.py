"""Sites: dispatches of a profile find their place in the IR, and are refused where they have none."""

from pathlib import Path

import pytest

from llmir_iree.compile import compile_mlir
from llmir_iree.targets import resolve_target
from llmir_iree.tracing.capture import Capture, CaptureError, DispatchRun, Site
from llmir_iree.tracing.ir_history import IrDump
from llmir_iree.tracing.sites import join_sites, sites_of_binary
from llmir_iree.tracing.stream_sites import read_stream_sites

# A parameter named as a model's, one outside layers, and between them an op that reads none.
LAYERS = """
util.global private @scale = #flow.parameter.named<"model"::"model.layers.3.mlp.down_proj.weight"> : tensor<64x64xf32>
util.global private @head = #flow.parameter.named<"model"::"lm_head.weight"> : tensor<64x64xf32>
func.func @main(%x: tensor<4x64xf32>) -> tensor<4x64xf32> {
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<4x64xf32>
  %init = linalg.fill ins(%zero : f32) outs(%empty : tensor<4x64xf32>) -> tensor<4x64xf32>
  %scale = util.global.load @scale : tensor<64x64xf32>
  %head = util.global.load @head : tensor<64x64xf32>
  %a = linalg.matmul ins(%x, %scale : tensor<4x64xf32>, tensor<64x64xf32>) outs(%init : tensor<4x64xf32>)
      -> tensor<4x64xf32>
  %b = linalg.softmax dimension(1) ins(%a : tensor<4x64xf32>) outs(%empty : tensor<4x64xf32>) -> tensor<4x64xf32>
  %c = linalg.matmul ins(%b, %scale : tensor<4x64xf32>, tensor<64x64xf32>) outs(%init : tensor<4x64xf32>)
      -> tensor<4x64xf32>
  %d = linalg.matmul ins(%c, %head : tensor<4x64xf32>, tensor<64x64xf32>) outs(%init : tensor<4x64xf32>)
      -> tensor<4x64xf32>
  return %d : tensor<4x64xf32>
}
"""


@pytest.fixture(scope="module")
def layers_ir(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("layers") / "stream.mlir"
    compile_mlir(LAYERS, output, (*resolve_target("llvm-cpu").flags, "--compile-to=stream", "--mlir-print-debuginfo"))
    return output.read_text()


def test_weights_and_layers_come_from_parameters(layers_ir: str) -> None:
    sites = join_sites([], "main", stream_ir=layers_ir, portable=LAYERS)
    assert [(site.weight, site.layer) for site in sites] == [
        ("model.layers.3.mlp.down_proj.weight", 3),
        (None, 3),
        ("model.layers.3.mlp.down_proj.weight", 3),
        ("lm_head.weight", None),
    ]
    assert [site.flops for site in sites if site.kind.startswith("matmul")] == [2 * 4 * 64 * 64] * 3
    assert sites[0].bytes_read == (4 * 64 + 64 * 64) * 4


def test_lines_point_to_ops(layers_ir: str) -> None:
    sites = join_sites([], "main", stream_ir=layers_ir, portable=LAYERS)
    lines = LAYERS.splitlines()
    assert all(site.line is not None and lines[site.line - 1].strip() == site.op for site in sites)
    assert [str(site.op)[:4] for site in sites] == ["%a =", "%b =", "%c =", "%d ="]


def test_sizes_that_vary_come_from_inputs(small_capture: Capture) -> None:
    [matmul, softmax] = small_capture.read(Site)
    assert matmul.bytes_read == (256 * 768 + 768 * 512) * 4
    assert matmul.bytes_written == 256 * 512 * 4
    assert matmul.flops == 2 * 256 * 768 * 512
    assert softmax.bytes_read == softmax.bytes_written == 256 * 512 * 4
    assert "linalg.matmul" in str(matmul.op)


def test_sizes_without_inputs_are_not_known(small_capture: Capture) -> None:
    [phase] = (small_capture.ir / "phases").glob("*.stream.mlir")
    matmul, softmax = read_stream_sites(phase.read_text(), "main")
    assert matmul.work is not None
    assert softmax.work is not None
    assert (matmul.work.bytes_read, matmul.work.flops) == (None, None)
    assert softmax.work.bytes_read == 256 * 512 * 4


def test_ir_of_something_else_is_refused(small_capture: Capture, layers_ir: str) -> None:
    with pytest.raises(CaptureError, match="main: dispatch 0 of a call was main_dispatch_0_matmul"):
        join_sites(small_capture.read(DispatchRun), "main", stream_ir=layers_ir, portable=LAYERS)


def test_text_that_is_no_ir_is_refused() -> None:
    with pytest.raises(CaptureError, match="the IR at stream level cannot be read"):
        read_stream_sites("module {", "main")


def test_a_binary_alone_tells_kinds(small_capture: Capture) -> None:
    sites = sites_of_binary(small_capture.read(DispatchRun))
    assert [site.site for site in sites] == [0, 1]
    assert [site.kind.removesuffix("_like") for site in sites] == ["matmul", "softmax"]
    assert {site.executable for site in sites} == {"main_dispatch_0", "main_dispatch_1"}
    assert all(site.flops is None and site.op is None for site in sites)


def test_what_the_ir_folder_holds(small_capture: Capture) -> None:
    folder = small_capture.ir
    text = (folder / "portable.mlir").read_text()
    assert "linalg.matmul" in text
    assert "loc(" in (folder / "debug.mlir").read_text()
    assert len(list((folder / "phases").glob("*.mlir"))) == 12
    assert {history.executable for history in IrDump.open(small_capture.folder).dispatches} == {
        "main_dispatch_0",
        "main_dispatch_1",
    }
    # What was compiled into is gone: all that is left has a name that the documents tell.
    assert {file.name for file in folder.iterdir()} == {
        "portable.mlir",
        "debug.mlir",
        "phases",
        "passes.mlir.zst",
        "binaries",
    }
    suffixes = {file.suffix for file in (folder / "binaries").iterdir()}
    assert {".so", ".ll", ".s"} <= suffixes


# Two rows of many are replaced, in place, and one is taken out.
ROWS = """
func.func @main(%cache: tensor<?x64xf16>, %rows: tensor<2x64xf16>, %where: tensor<2x1xi32>) -> tensor<?x64xf16> {
  %result = iree_linalg_ext.scatter dimension_map = [0] unique_indices(true)
      ins(%rows, %where : tensor<2x64xf16>, tensor<2x1xi32>) outs(%cache : tensor<?x64xf16>) {
    ^bb0(%new: f16, %old: f16):
      iree_linalg_ext.yield %new : f16
  } -> tensor<?x64xf16>
  return %result : tensor<?x64xf16>
}
"""


def test_rows_that_are_replaced_count_alone(tmp_path: Path) -> None:
    output = tmp_path / "stream.mlir"
    compile_mlir(ROWS, output, (*resolve_target("llvm-cpu").flags, "--compile-to=stream"))
    sites = read_stream_sites(output.read_text(), "main", [(1000, 64), (2, 64), (2, 1)])
    [scatter] = [site.work for site in sites if "scatter" in site.key]
    assert scatter is not None
    assert (scatter.bytes_read, scatter.bytes_written) == (2 * 64 * 2 + 2 * 4, 2 * 64 * 2)
