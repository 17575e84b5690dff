"""Captures of whole generations."""

import importlib.util
import itertools
from collections import Counter
from pathlib import Path

import pytest

from llmir_iree.bundle import Bundle
from llmir_iree.params.errors import BundleError
from llmir_iree.trace_subjects import find_ir
from llmir_iree.tracing import generate_capture
from llmir_iree.tracing.capture import Call, Capture, CaptureError, DispatchRun, MachineInfo, Site, ZoneTotal
from llmir_iree.tracing.generate_capture import record_generate
from llmir_iree.tracing.sites import place_runs
from llmir_iree.tracing.tracy_file import read_tracy

pytestmark = [
    pytest.mark.timed,
    pytest.mark.skipif(
        importlib.util.find_spec("iree._runtime_libs_tracy") is None,
        reason="IREE's tracer is missing: install a wheel of iree-base-runtime for Linux",
    ),
]

TOKENS = 6


@pytest.fixture(scope="module")
def capture(smollm2_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    output = tmp_path_factory.mktemp("captures") / "generate.llmtrace"
    machine = MachineInfo(cpu="known", cores=2)
    record_generate(
        smollm2_bundle.folder,
        output,
        prompt="-",
        max_tokens=TOKENS,
        timeout_s=120,
        machine=lambda: machine,
        ir=find_ir(smollm2_bundle.folder, None),
    )
    return Capture.open(output)


def test_a_call_for_every_token(capture: Capture) -> None:
    calls = capture.read(Call)
    assert [call.function for call in calls] == ["prefill_bs1"] + ["decode_bs1"] * (TOKENS - 1)
    assert [call.call for call in calls] == list(range(TOKENS))
    assert all(first.start_ns + first.wall_ns <= second.start_ns for first, second in itertools.pairwise(calls))


def test_dispatches_lie_in_their_calls(capture: Capture) -> None:
    calls = {call.call: call for call in capture.read(Call)}
    runs = capture.read(DispatchRun)
    for run in runs:
        call = calls[run.call]
        assert (run.function, call.start_ns <= run.start_ns) == (call.function, True)
        assert run.start_ns + run.duration_ns <= call.start_ns + call.wall_ns
        assert run.duration_ns > 0
        assert run.tile_ns > 0
    decodes = Counter(run.call for run in runs if run.function == "decode_bs1")
    assert len(set(decodes.values())) == 1
    assert [run.site for run in runs if run.call == 1] == list(range(decodes[1]))
    # The model has 30 layers, and a product of gate and up projections in each.
    gated = [run for run in runs if run.call == 1 and "gated_matmul" in run.key]
    assert len(gated) == 30


def test_dispatches_have_call_sites(capture: Capture, smollm2_bundle: Bundle) -> None:
    """Of both functions: a layer's matmuls read its weights, in every call."""
    model = smollm2_bundle.manifest.model
    for function in ("prefill_bs1", "decode_bs1"):
        sites = {site.site: site for site in capture.read(Site) if site.function == function}
        assert {site.layer for site in sites.values()} == {None, *range(model.layers)}
        gated = [site for site in sites.values() if site.kind == "gated_matmul"]
        assert [site.layer for site in gated] == list(range(model.layers))
        assert all(f"layers.{site.layer}." in str(site.weight) for site in gated)
        assert all(site.line and site.op for site in gated)
        runs = [run for run in capture.read(DispatchRun) if run.function == function]
        assert {(run.site, run.key) for run in runs} == {(site.site, site.key) for site in sites.values()}


def test_without_ir_it_says_so(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "x.llmtrace"
    capture = record_generate(smollm2_bundle.folder, output, prompt="a", max_tokens=1, timeout_s=60)
    assert capture.manifest.missing["sites of prefill_bs1"] == "no IR is given"
    assert {site.layer for site in capture.read(Site)} == {None}


def test_runs_find_their_places() -> None:
    assert place_runs(["b", "a", "a", "c"], ["a", "b", "c", "a"]) == [1, 0, 3, 2]
    with pytest.raises(CaptureError, match="a call dispatched a 1 times, in the IR it is 2"):
        place_runs(["b", "a"], ["a", "b", "a"])
    with pytest.raises(CaptureError, match="a call dispatched d 1 times, in the IR it is 0"):
        place_runs(["a", "d"], ["a"])


def test_most_of_a_step_is_in_its_dispatches(capture: Capture) -> None:
    wall = sum(call.wall_ns for call in capture.read(Call))
    assert 0.5 < sum(run.duration_ns for run in capture.read(DispatchRun)) / wall <= 1


def test_zones_tell_what_lies_between(capture: Capture) -> None:
    counts = {total.name: total.count for total in capture.read(ZoneTotal)}
    assert {name: counts[name] for name in ("prefill", "step", "sample", "detokenise")} == {
        "prefill": 1,
        "step": TOKENS - 1,
        "sample": TOKENS,
        "detokenise": TOKENS,
    }
    [file] = capture.profiles("tracy")
    trace = read_tracy(file)
    begin, end = [message.text for message in trace.messages]
    assert begin.startswith("request 0 begins: ")
    assert end == f"request 0 ends: {TOKENS} tokens, length"


def test_the_manifest_says_what_was_recorded(capture: Capture, smollm2_bundle: Bundle) -> None:
    manifest = capture.manifest
    assert (manifest.phase, manifest.processes, manifest.sources) == ("generate", 1, ("tracy",))
    assert manifest.functions == ("decode_bs1", "prefill_bs1")
    assert manifest.machine.cpu == "known"
    modules = smollm2_bundle.target().modules
    assert manifest.modules == {info.file: info.sha256 for info in modules.values()}
    assert set(manifest.missing) == {"ireeprof", "ir", "workgroups"}


def test_a_crash_leaves_the_calls_before_it(
    smollm2_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ends inside the fourth call, after its dispatches, and leaves the client time to send what it has.
    crash = """
import contextlib, os, time
from llmir_iree import session
zone, calls = session.zone, []
@contextlib.contextmanager
def crash(name):
    with zone(name):
        yield
        calls.append(name)
        if len(calls) == 4:
            time.sleep(0.5)
            os.kill(os.getpid(), 9)
session.zone = crash
"""
    monkeypatch.setattr(generate_capture, "_PROGRAM", crash + generate_capture._PROGRAM)
    output = tmp_path / "x.llmtrace"
    capture = record_generate(smollm2_bundle.folder, output, prompt="a", max_tokens=TOKENS, timeout_s=60)
    assert "killed by SIGKILL" in capture.manifest.missing["end"]
    assert [call.function for call in capture.read(Call)] == ["prefill_bs1", "decode_bs1", "decode_bs1"]
    runs = Counter(run.call for run in capture.read(DispatchRun))
    assert set(runs) == {0, 1, 2}
    assert runs[1] == runs[2]


def test_a_capture_is_not_replaced_unasked(capture: Capture, smollm2_bundle: Bundle) -> None:
    with pytest.raises(CaptureError, match="exists; --force replaces it"):
        record_generate(smollm2_bundle.folder, capture.folder, prompt="a", max_tokens=1, timeout_s=60)


def test_what_the_program_refuses_is_told(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "x.llmtrace"
    with pytest.raises(
        CaptureError, match=r"before its first call \(exit code 2\): llmir-run: error: device 'nodevice'"
    ):
        record_generate(smollm2_bundle.folder, output, prompt="a", max_tokens=1, device="nodevice", timeout_s=60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prompt": ""}, "the prompt is empty"), ({"max_tokens": 0}, "max_tokens is 0"), ({"target": "cuda"}, "cuda")],
)
def test_wrong_options_are_refused_before_anything_runs(
    smollm2_bundle: Bundle, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    given: dict[str, object] = {"prompt": "a", "max_tokens": 1, "timeout_s": 60, **options}
    with pytest.raises((CaptureError, BundleError), match=message):
        record_generate(smollm2_bundle.folder, tmp_path / "x.llmtrace", **given)  # type: ignore[arg-type]
