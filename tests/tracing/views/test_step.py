"""The step that stands for all: which one, and how its time divides."""

from llmir_iree.tracing.capture import Call, DispatchRun, write_rows
from llmir_iree.tracing.table import steady_steps
from llmir_iree.tracing.views.step import typical_steps


def test_median_step_stands_for_all(make_capture):
    capture = make_capture()
    [step] = typical_steps(capture)
    assert len(step.steps) == 10
    assert step.typical.wall_ns == sorted(other.wall_ns for other in steady_steps(capture))[4]
    assert [run.site for run in step.runs] == list(range(200))
    assert step.between_ns + sum(run.duration_ns for run in step.runs) == step.wall_ns


def test_a_call_without_dispatches_stands_for_none_that_has_them(make_capture):
    capture = make_capture()
    runs = [run for run in capture.read(DispatchRun) if (run.process, run.call) == (1, 4)]
    write_rows(capture.folder, DispatchRun, runs)
    [step] = typical_steps(capture)
    assert (step.typical.call.process, step.typical.call.call) == (1, 4)
    assert len(step.runs) == 200


def test_functions_come_in_the_order_of_the_manifest(make_capture):
    capture = make_capture()
    calls = capture.read(Call)
    write_rows(capture.folder, Call, [calls[0].model_copy(update={"function": "prefill"}), *calls[1:]])
    capture.manifest = capture.manifest.model_copy(update={"functions": ("prefill", "decode")})
    assert [step.function for step in typical_steps(capture)] == ["prefill", "decode"]
    assert typical_steps(capture)[0].runs == ()
