"""llmir-trace record: what is refused, what is told and left out, and a whole bundle's step."""

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmir_iree.bundle import Bundle
from llmir_iree.cli.trace import main
from llmir_iree.tracing import record as recording
from llmir_iree.tracing import workload
from llmir_iree.tracing.capture import MANIFEST_NAME, Call, Capture, CaptureError, DispatchRun, Site
from llmir_iree.tracing.ireeprof import read_totals
from llmir_iree.tracing.table import aggregate, balance, sort_rows
from llmir_iree.tracing.workload import Workload, check_input, read_clock
from tests.tracing.conftest import INPUTS


def record(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["record", *map(str, arguments)])


@pytest.fixture(scope="module")
def small_vmfb(small_text: Path) -> Path:
    """The small module as a file that no one knows the IR of."""
    from llmir_iree.compile import compile_mlir
    from llmir_iree.targets import resolve_target

    output = small_text.with_name("compiled.vmfb")
    compile_mlir(small_text.read_text(), output, resolve_target("llvm-cpu").flags)
    return output


def test_a_compiled_module_alone(small_vmfb: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.llmtrace"
    done = record(small_vmfb, *INPUTS, "--runs", "3", "--processes", "1", "-o", output, "--json")
    assert done.exit_code == 0, done.output
    capture = Capture.open(output)
    assert (capture.manifest.sources, capture.manifest.missing) == (("ireeprof",), {})
    assert capture.manifest.functions == ("main",)
    assert capture.manifest.model_dump_json(indent=2) in done.stdout
    assert len(capture.read(Call)) == 4
    assert {site.kind.removesuffix("_like") for site in capture.read(Site)} == {"matmul", "softmax"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.llmtrace"}


# The host reads a value before it goes on: a call takes two submissions.
TWO_SUBMISSIONS = """
func.func @main(%a: tensor<64x64xf32>) -> tensor<64x64xf32> {
  %zero = arith.constant 0.0 : f32
  %c0 = arith.constant 0 : index
  %empty = tensor.empty() : tensor<64x64xf32>
  %init = linalg.fill ins(%zero : f32) outs(%empty : tensor<64x64xf32>) -> tensor<64x64xf32>
  %p = linalg.matmul ins(%a, %a : tensor<64x64xf32>, tensor<64x64xf32>) outs(%init : tensor<64x64xf32>)
      -> tensor<64x64xf32>
  %value = tensor.extract %p[%c0, %c0] : tensor<64x64xf32>
  %second = linalg.fill ins(%value : f32) outs(%empty : tensor<64x64xf32>) -> tensor<64x64xf32>
  %q = linalg.matmul ins(%a, %p : tensor<64x64xf32>, tensor<64x64xf32>) outs(%second : tensor<64x64xf32>)
      -> tensor<64x64xf32>
  return %q : tensor<64x64xf32>
}
"""


def test_a_call_of_two_submissions_is_one_call(tmp_path: Path) -> None:
    text, output = tmp_path / "two.mlir", tmp_path / "two.llmtrace"
    text.write_text(TWO_SUBMISSIONS)
    counts = ("--runs", "4", "--processes", "1", "--with", "ireeprof")
    done = record(text, "--input", "64x64xf32=0.01", *counts, "-o", output)
    assert done.exit_code == 0, done.output
    capture = Capture.open(output)
    assert (len(capture.read(Call)), capture.manifest.missing) == (5, {})
    assert [run.site for run in capture.read(DispatchRun)] == [0, 1] * 5
    assert [str(site.op)[:4] for site in capture.read(Site)] == ["%p =", "%q ="]


def test_two_subjects_take_turns(small_vmfb: Path, small_text: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.llmtrace", tmp_path / "b.llmtrace"
    counts = ("--runs", "2", "--processes", "3", "--with", "ireeprof")
    done = record(small_vmfb, *INPUTS, *counts, "-o", a, "--against", small_text, b, "--json")
    assert done.exit_code == 0, done.output
    manifests = [Capture.open(output).manifest for output in (a, b)]
    assert json.loads(done.stdout) == [manifest.model_dump(mode="json") for manifest in manifests]
    assert manifests[0].session is not None
    assert manifests[0].session == manifests[1].session
    assert [manifest.target for manifest in manifests] == [None, "llvm-cpu"]
    times = [(*manifest.process_ns,) for manifest in manifests]
    ran = sorted((start, end, side) for side, processes in zip("ab", times, strict=True) for start, end in processes)
    assert "".join(side for *_, side in ran) == "abbaab"
    assert all(before[1] <= after[0] for before, after in pairwise(ran))
    assert len(Capture.open(a).read(Call)) == len(Capture.open(b).read(Call)) == 3 * (1 + 2)
    told = [line for line in done.stderr.splitlines() if "process 1 of 3" in line]
    assert [line.rpartition(" to ")[2].rstrip(" .)") for line in told] == ["a.llmtrace", "b.llmtrace"]


def test_another_recording_is_another_session(small_capture: Capture, small_vmfb: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.llmtrace"
    assert record(small_vmfb, *INPUTS, "--runs", "1", "--processes", "1", "-o", output).exit_code == 0
    assert Capture.open(output).manifest.session not in (None, small_capture.manifest.session)


def test_flags_of_the_other_side(small_text: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.llmtrace", tmp_path / "b.llmtrace"
    other = ("--against", small_text, b, "--against-flag=--iree-llvmcpu-target-cpu=generic")
    counts = ("--runs", "1", "--processes", "1", "--with", "ireeprof", "--quiet")
    done = record(small_text, *INPUTS, *counts, "-o", a, *other, "--", "--iree-opt-level=O1")
    assert done.exit_code == 0, done.output
    flags = [Capture.open(output).manifest.flags for output in (a, b)]
    assert flags[1] == (*flags[0], "--iree-llvmcpu-target-cpu=generic")
    assert flags[0][-1] == "--iree-opt-level=O1"


@pytest.mark.parametrize("fails", [0, 1])
def test_of_two_that_fail_none_is_written(
    small_vmfb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    seen = Counter[str]()

    def fail_one(command: list[str], **options: float) -> str:
        seen["runs"] += 1
        if seen["runs"] == fails + 1:
            raise CaptureError("out of memory")
        return run_child(command, **options)

    run_child = recording.run_child
    monkeypatch.setattr(recording, "run_child", fail_one)
    counts = ("--runs", "1", "--processes", "1")
    outputs = tmp_path / "a.llmtrace", tmp_path / "b.llmtrace"
    done = record(small_vmfb, *INPUTS, *counts, "-o", outputs[0], "--against", small_vmfb, outputs[1])
    assert done.exit_code == 2
    assert "nothing was captured: out of memory" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--against", "SUBJECT", "a.llmtrace"), "two captures cannot be written to one place"),
        (("--against-flag=--iree-opt-level=O1",), "there is nothing to record against"),
        (("--against", "none.vmfb", "b.llmtrace"), "none.vmfb: no such bundle, module or MLIR file"),
        (("--against", "SUBJECT", "b.llmtrace", "--phase", "generate"), "--against: not with --phase generate"),
        (("--with", "ireeprof", "--phase", "generate"), "--with: not with --phase generate"),
    ],
)
def test_what_does_not_go_together(
    small_vmfb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [str(small_vmfb) if argument == "SUBJECT" else argument for argument in arguments]
    done = record(small_vmfb, "-o", "a.llmtrace", *named)
    assert done.exit_code == 2
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--function", "nope"), "no function nope; it has main"),
        (("--with", "ireeprof,perf"), "cannot record 'perf'; what can be recorded: ireeprof, tracy, ir"),
        (("--with", ""), "nothing to record"),
        (("--runs", "0"), "runs is 0"),
        (("--timeout", "0"), "timeout is 0 s"),
        (("--input", "4by8"), "--input 4by8: expected a shape, a type and values"),
        (("--phase", "decode", "--function", "main"), "are for bundles only"),
        (("--", "--iree-opt-level=O0"), "go with a .mlir file only"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    small_vmfb: Path, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = record("-o", tmp_path / "a.llmtrace", small_vmfb, *arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_subject_that_is_not_there(tmp_path: Path) -> None:
    done = record(tmp_path / "none.vmfb", "-o", tmp_path / "a.llmtrace")
    assert done.exit_code == 2
    assert "no such bundle, module or MLIR file" in done.stderr


def test_a_prompt_goes_with_a_generation(small_vmfb: Path, tmp_path: Path) -> None:
    done = record(small_vmfb, "--prompt", "Hello", "-o", tmp_path / "a.llmtrace")
    assert done.exit_code == 2
    assert "--prompt and --max-tokens go with --phase generate" in done.stderr


def test_a_file_that_is_no_module(tmp_path: Path) -> None:
    fake = tmp_path / "fake.vmfb"
    fake.write_bytes(b"not a module")
    done = record(fake, "-o", tmp_path / "a.llmtrace")
    assert done.exit_code == 2
    assert "fake.vmfb: not a compiled module" in done.stderr


def test_what_exists_is_replaced_only_if_forced(small_vmfb: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.llmtrace"
    arguments = (small_vmfb, *INPUTS, "--runs", "1", "--processes", "1", "-o", output)
    assert record(*arguments).exit_code == 0
    before = (output / MANIFEST_NAME).read_bytes()
    refused = record(*arguments)
    assert refused.exit_code == 2
    assert "--force replaces it" in refused.stderr
    assert (output / MANIFEST_NAME).read_bytes() == before
    assert record(*arguments, "--runs", "2", "--force").exit_code == 0
    assert len(Capture.open(output).read(Call)) == 3


def test_a_folder_that_is_no_capture_is_never_replaced(small_vmfb: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = record(small_vmfb, *INPUTS, "-o", tmp_path / "mine", "--force")
    assert done.exit_code == 2
    assert "exists and is not a capture" in done.stderr
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_nothing_captured_is_an_error_and_leaves_nothing(small_vmfb: Path, tmp_path: Path) -> None:
    done = record(small_vmfb, "--input", "3x3xf32=1", "-o", tmp_path / "a.llmtrace")
    assert done.exit_code == 2
    assert "nothing was captured: iree-benchmark-module: exit code 1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_workload_that_crashes_is_noted_and_the_rest_is_written(
    small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    monkeypatch.setattr(Workload, "command", lambda *_args, **_options: crash)
    output = tmp_path / "a.llmtrace"
    done = record(small_text, *INPUTS, "-o", output)
    assert done.exit_code == 0, done.output
    capture = Capture.open(output)
    assert capture.manifest.sources == ("ir",)
    assert "killed by SIGSEGV" in capture.manifest.missing["ireeprof"]
    assert "missing: ireeprof" in done.stderr
    shown = CliRunner().invoke(main, ["show", str(output)])
    assert shown.exit_code == 2
    assert "killed by SIGSEGV" in shown.stderr


def test_a_workload_that_hangs_meets_its_deadline(
    small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Workload, "command", lambda *_args, **_options: hang)
    done = record(small_text, *INPUTS, "-o", tmp_path / "a.llmtrace", "--timeout", "1", "--with", "ireeprof")
    assert done.exit_code == 2
    assert "no end after 1 s" in done.stderr


def test_a_later_process_that_fails_leaves_the_earlier_ones(
    small_vmfb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_child, seen = recording.run_child, Counter[str]()

    def fail_second(command: list[str], **options: float) -> str:
        seen["runs"] += 1
        if seen["runs"] == 2:
            raise CaptureError("out of memory")
        return run_child(command, **options)

    monkeypatch.setattr(recording, "run_child", fail_second)
    output = tmp_path / "a.llmtrace"
    assert record(small_vmfb, *INPUTS, "--runs", "2", "-o", output).exit_code == 0
    capture = Capture.open(output)
    assert capture.manifest.processes == 1
    assert capture.manifest.missing == {"ireeprof from process 1 on": "out of memory"}
    assert [path.name for path in capture.profiles("ireeprof")] == ["process-0.ireeprof"]


def test_a_missing_tool_is_told(small_vmfb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(name: str, **_options: bool) -> str:
        raise CaptureError(f"{name}: not in this installation")

    monkeypatch.setattr(workload, "runtime_tool", lack)
    done = record(small_vmfb, *INPUTS, "-o", tmp_path / "a.llmtrace")
    assert done.exit_code == 2
    assert "iree-benchmark-module: not in this installation" in done.stderr


def test_a_device_without_profile_is_named(small_vmfb: Path, tmp_path: Path) -> None:
    done = record(small_vmfb, *INPUTS, "-o", tmp_path / "a.llmtrace", "--device", "cuda://9")
    assert done.exit_code == 2
    assert "cuda://9: iree-benchmark-module" in done.stderr


@pytest.mark.parametrize("text", ["4x8xf32=1", "1xi32", "f32=2", "3", "-1.5", "@values.npy", "2x2xi8=1 2 3 4"])
def test_inputs_of_all_forms_pass(text: str) -> None:
    assert check_input(text) == text


def test_shapes_of_inputs() -> None:
    inputs = ("4x8xf32=1", "f32=2", "@values.npy", "7")
    assert Workload(Path("m.vmfb"), "f", inputs).shapes == ((4, 8), (), None, None)


@pytest.mark.parametrize("text", ["", "{}", '{"benchmarks": []}', '{"benchmarks": [{"iterations": 3}]}'])
def test_a_tool_that_tells_no_times_is_refused(text: str) -> None:
    with pytest.raises(CaptureError, match="told no times"):
        read_clock(text)


@pytest.fixture(scope="module")
def decode(smollm2_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    output = tmp_path_factory.mktemp("decode") / "decode.llmtrace"
    # Behind the last call of a process lies what no later call shows: many calls make that a small part.
    counts = ("--runs", "40", "--processes", "2", "--context", "100", "--with", "ireeprof")
    done = record(smollm2_bundle.folder, *counts, "-o", output)
    assert done.exit_code == 0, done.output
    return Capture.open(output)


@pytest.mark.timed
def test_a_bundle_s_step_adds_up(decode: Capture) -> None:
    assert decode.manifest.missing == {}
    assert (decode.manifest.phase, decode.manifest.context, decode.manifest.batch_size) == ("decode", 100, 1)
    assert abs(balance(decode).difference) < 0.03
    for process, file in enumerate(decode.profiles("ireeprof")):
        sums: Counter[str] = Counter()
        for run in decode.read(DispatchRun):
            if run.process == process:
                sums[run.key] += run.duration_ns
        assert {key: total.total_ns for key, total in read_totals(file).items()} == sums


@pytest.mark.timed
def test_a_bundle_s_sites_read_its_weights(decode: Capture, smollm2_bundle: Bundle) -> None:
    manifest = smollm2_bundle.manifest
    sites = decode.read(Site)
    assert {site.layer for site in sites} == {None, *range(manifest.model.layers)}
    matmuls = [site for site in sites if site.kind in ("quantized_matmul", "gated_matmul")]
    assert len(matmuls) == 4 * manifest.model.layers + 1
    assert {site.weight for site in matmuls} >= set(manifest.parameters.merged)
    # All weights are read once by a step, but for vectors, which are less than one part in a hundred.
    read = sum(site.bytes_read for site in matmuls if site.bytes_read is not None)
    assert read == pytest.approx(manifest.parameters.decode_bytes, rel=0.02)
    attention = next(site for site in sites if site.kind == "rope_append_attend")
    assert attention.shape == f"1x{manifest.model.heads}x1x101x{manifest.model.head_dim}"
    assert "util.call @llmir_rope_append_attend" in str(attention.op)


@pytest.mark.timed
def test_a_bundle_s_layers_are_alike(decode: Capture, smollm2_bundle: Bundle) -> None:
    first, *rows = [row for row in sort_rows(aggregate(decode, "layer"), "layer") if row.layer is not None]
    assert len(rows) == smollm2_bundle.manifest.model.layers - 1
    assert {(row.count, row.nbytes) for row in rows} == {(8, rows[0].nbytes)}
    # The first layer has no residual in front of its norm.
    assert (first.count, first.nbytes) != (8, rows[0].nbytes)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--batch", "3"), "no decode for batch size 3"),
        (("--context", "100000"), "context 100000"),
        (("--phase", "prefill", "--tokens", "1"), "1 tokens: a prefill takes 2 to"),
        (("--tokens", "2"), "a decode takes one token"),
        (("--function", "decode_bs1"), "a bundle's are known"),
        (("--target", "cuda"), "not compiled for cuda"),
    ],
)
def test_a_bundle_refuses(smollm2_bundle: Bundle, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = record(smollm2_bundle.folder, *arguments, "-o", tmp_path / "a.llmtrace")
    assert done.exit_code == 2
    assert told in done.stderr
