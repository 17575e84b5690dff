"""Workgroups that exports declare: as recorded, computed from what a dispatch passes, or not known."""

import pytest

from llmir_iree.tracing.capture import Capture, CaptureError, DispatchRun
from llmir_iree.tracing.stream_sites import read_stream_sites
from llmir_iree.tracing.workgroup_counts import declared_workgroups

TARGETS = """
#layout = #hal.pipeline.layout<bindings = [#hal.pipeline.binding<storage_buffer>]>
#target = #hal.executable.target<"llvm-cpu", "embedded-elf-x86_64", {}>
#map = affine_map<()[s0] -> (s0 + 1)>
hal.executable private @work {
  hal.executable.variant public @variant target(#target) {
    hal.executable.export public @run ordinal(0) layout(#layout)
        count(%device: !hal.device, %rows: index, %columns: index) -> (index, index, index) {
      %c1 = arith.constant 1 : index
      %c16 = arith.constant 16 : index
      %x = arith.ceildivui %rows, %c16 : index
      hal.return %x, %columns, %c1 : index, index, index
    }
    hal.executable.export public @mapped ordinal(1) layout(#layout)
        count(%device: !hal.device, %rows: index) -> (index, index, index) {
      %c1 = arith.constant 1 : index
      %x = affine.apply #map()[%rows]
      hal.return %x, %c1, %c1 : index, index, index
    }
  }
}
"""


@pytest.mark.parametrize(
    ("executable", "export", "workload", "count"),
    [
        ("work", "run", (33, 7), (3, 7, 1)),
        ("work", "run", (32, None), None),
        ("work", "run", (32,), None),
        ("work", "mapped", (5,), None),
        ("work", "other", (33, 7), None),
        ("other", "run", (33, 7), None),
    ],
)
def test_counts_are_computed_where_they_can_be(
    executable: str, export: str, workload: tuple[int | None, ...], count: tuple[int, int, int] | None
) -> None:
    assert declared_workgroups(TARGETS, executable, export, workload) == count


def test_a_recording_has_what_its_exports_declare(small_capture: Capture) -> None:
    [stream] = (small_capture.ir / "phases").glob("*.stream.mlir")
    [targets] = (small_capture.ir / "phases").glob("*.executable-targets.mlir")
    sites = read_stream_sites(stream.read_text(), "main", small_capture.manifest.shapes)
    text = targets.read_text()
    declared = {n: declared_workgroups(text, site.executable, site.key, site.workload) for n, site in enumerate(sites)}
    assert declared == {run.site: run.workgroups for run in small_capture.read(DispatchRun)}


def test_what_is_no_ir_is_refused() -> None:
    with pytest.raises(CaptureError, match="the IR of executables cannot be read"):
        declared_workgroups("hal.executable {", "work", "run", ())
