"""The report on targets: what it finds right, and what it finds wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmir_iree import check_gpu, check_targets, op_runs
from llmir_iree.bundle import Bundle
from llmir_iree.check_targets import Checks, OpCheck, as_markdown
from llmir_iree.compile import read_portable
from llmir_iree.op_runs import build_module, describe, distinct_calls
from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import LlmirCall
from llmir_iree.shape_models import bundle_model
from llmir_iree.targets import resolve_target


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of each op of a phase: each takes a compile."""

    def one_of_each(portable: str) -> list[LlmirCall]:
        return list({call.op: call for call in distinct_calls(portable)}.values())

    monkeypatch.setattr(op_runs, "distinct_calls", one_of_each)


@pytest.mark.usefixtures("few_calls")
def test_the_cpu_s_ops_are_run_and_right(exported: Bundle) -> None:
    checks = check_targets.check_targets(bundle_model(exported), ["llvm-cpu"], "portable", whole=False)
    assert checks.faults == []
    ops = {check.op.split()[0] for check in checks.ops}
    assert {"append_kv", "paged_attention"} < ops
    # Sums of up to 128 products of float32, in any order; the cache is stored exactly.
    assert all(check.error is not None and check.error < 128 * np.finfo(np.float32).eps for check in checks.ops)
    assert {check.error for check in checks.ops if check.op.startswith("append_kv")} == {0.0}


@pytest.mark.usefixtures("few_calls")
def test_a_wrong_kernel_is_a_fault(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = op_runs._reference
    monkeypatch.setattr(op_runs, "_reference", lambda *a: tuple(value + 1 for value in reference(*a)))
    checks = check_targets.check_targets(bundle_model(exported), ["llvm-cpu"], "portable", whole=False)
    assert len(checks.faults) == len(checks.ops)
    assert "off by" in checks.faults[0]


def test_not_a_number_is_an_error_of_infinity() -> None:
    assert op_runs._error(np.array([1.0, np.nan]), np.array([1.0, 2.0], np.float32)) == float("inf")


@pytest.mark.usefixtures("few_calls")
def test_what_does_not_compile_is_a_fault_and_the_rest_goes_on(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: object, *_: object) -> None:
        if call.op == "append_kv":  # type: ignore[attr-defined]
            raise CompileError("no")
        return build_module(call, *_)  # type: ignore[arg-type]

    monkeypatch.setattr(op_runs, "build_module", refuse)
    checks = check_targets.check_targets(bundle_model(exported), ["llvm-cpu"], "portable", whole=False)
    assert {fault.split(":")[0] for fault in checks.faults} == {"llvm-cpu"}
    assert all("append_kv" in fault and fault.endswith("no") for fault in checks.faults)
    assert any(check.op.startswith("paged_attention") for check in checks.ops)


@pytest.mark.usefixtures("few_calls")
def test_modules_are_checked_whole(exported: Bundle) -> None:
    checks = check_targets.check_targets(bundle_model(exported), ["llvm-cpu"])
    assert checks.faults == []
    assert [check.phase for check in checks.modules] == ["prefill", "decode"]
    text = as_markdown(checks, "model")
    assert text.count("| llvm-cpu | decode_bs") == 2
    assert "2 rope_append_attend" in text


def test_what_is_no_model_is_refused_in_one_line() -> None:
    result = CliRunner().invoke(check_targets.main, ["nonsense"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("or name a model's shapes: tinyllama")


def test_an_op_of_a_module_is_one_definition(exported: Bundle) -> None:
    calls = distinct_calls(read_portable(exported, "decode"))
    assert len({call.symbol for call in calls}) == len(calls)
    assert {describe(call) for call in calls if call.op == "append_kv"} == {"append_kv 1x1x2x16", "append_kv 2x1x2x16"}
    module = build_module(calls[0], resolve_target("vulkan:llvmpipe"), "portable")
    assert module.text.count("util.func public @main") == 1


def test_the_report_names_what_is_missing() -> None:
    checks = Checks([], [OpCheck("cuda", "append_kv", "portable", 1, 5, 0, 8, 0, None)], ["cuda: decode: broken"])
    text = as_markdown(checks, "model")
    assert "| cuda | append_kv | portable | 1 | 5 | 0 | 8 | 0 | not run |" in text
    assert "- cuda: decode: broken" in text


def test_spilling_kernels_are_faults_and_portable_code_is_not() -> None:
    kernel = OpCheck("cuda", "append_kv", "gpu-kernels", 1, 5, 0, 255, 16, None)
    assert list(check_targets._faults(kernel)) == ["cuda: append_kv: gpu-kernels spills 16 bytes"]
    portable = OpCheck("cuda", "append_kv", "portable-fused", 1, 5, 0, 255, 16, None)
    assert not list(check_targets._faults(portable))


def test_without_a_gpu_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "find_gpu", lambda: None)
    result = CliRunner().invoke(check_gpu.main, [str(tmp_path), str(tmp_path)])
    assert result.exit_code == 0
    assert "no CUDA GPU here: nothing was checked" in result.stderr
