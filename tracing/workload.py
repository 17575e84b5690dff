"""The program that is recorded: one function of a compiled module, called again and again by IREE's own tool."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmir_iree.bundle import PARAMETER_SCOPE, Bundle, Phase, TargetInfo
from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.children import runtime_tool
from llmir_iree.tracing.ir_values import Shape
from llmir_iree.tracing.op_costs import Step

# What local drivers time on the host, others on the device; a driver that cannot says so and ends.
_LOCAL_FAMILIES = "queue-events,host-execution,executable-metadata"
_DEVICE_FAMILIES = "queue-events,dispatch-events,executable-metadata"

# The least that modules of a bundle take: a prefill's tokens, and entries of a page table.
_MIN_PREFILL = 2
_MIN_TABLE = 2

_INPUT = re.compile(r"(?P<shape>(?:\d+x)*)(?P<element>[a-z]+\d+)(?:=.*)?", re.DOTALL)
_TOKEN = 7
_UNITS_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


@dataclass(frozen=True)
class Workload:
    """What to call, with what.

    Attributes:
        module: the compiled module.
        function: name of one that it exports.
        inputs: as IREE's tools take them, such as "4x8xf32=1".
        parameters: archives, each as "scope=file", or a file alone.
        device: IREE device URI.
    """

    module: Path
    function: str
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    device: str = "local-task"

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine's cores."""
        return self.device.startswith("local")

    @property
    def shapes(self) -> tuple[Shape | None, ...]:
        """Shapes of the inputs; None for those that stand in files."""
        return tuple(map(_shape, self.inputs))

    def command(
        self, calls: int, *, profile: Path | None = None, traced: bool = False, is_each_timed: bool = False
    ) -> list[str]:
        """The command that calls the function so many times, and tells on stdout how long that took, as JSON.

        Args:
            calls: at least one.
            profile: where to write an `.ireeprof`, if anywhere.
            traced: whether to take the runtime that sends its zones to Tracy.
            is_each_timed: whether it tells the time of each call, for `read_call_times`, or that of all, for
                `read_clock`.

        Raises:
            CaptureError: this installation lacks the tool.
        """
        families = _LOCAL_FAMILIES if self.is_local else _DEVICE_FAMILIES
        return [
            runtime_tool("iree-benchmark-module", traced=traced),
            f"--device={self.device}",
            f"--module={self.module}",
            *(f"--parameters={archive}" for archive in self.parameters),
            f"--function={self.function}",
            *(f"--input={value}" for value in self.inputs),
            f"--benchmark_min_time={1 if is_each_timed else calls}x",
            *((f"--benchmark_repetitions={calls}",) if is_each_timed else ()),
            "--benchmark_format=json",
            *((f"--device_profiling_mode={families}", f"--device_profiling_output={profile}") if profile else ()),
        ]


@dataclass(frozen=True)
class Clock:
    """How often a workload called its function, and how long all of that took by its own clock."""

    calls: int
    total_ns: int


def read_clock(stdout: str) -> Clock:
    """Read what `Workload.command` printed.

    Raises:
        CaptureError: it is not what the tool prints after a run.
    """
    return _read_clocks(stdout)[0]


def read_call_times(stdout: str) -> tuple[int, ...]:
    """Read what `Workload.command` printed of each call: its time in ns.

    Raises:
        CaptureError: it is not what the tool prints after a run.
    """
    return tuple(clock.total_ns for clock in _read_clocks(stdout))


def _read_clocks(stdout: str) -> list[Clock]:
    try:
        clocks = [_read_row(row) for row in json.loads(stdout)["benchmarks"] if row["run_type"] == "iteration"]
    except (ValueError, KeyError, TypeError):
        clocks = []
    if not clocks:
        raise CaptureError("iree-benchmark-module told no times; does the function take other inputs?")
    return clocks


def _read_row(row: dict[str, Any]) -> Clock:
    calls = int(row["iterations"])
    return Clock(calls, round(row["real_time"] * _UNITS_NS[row["time_unit"]] * calls))


def bundle_workload(
    bundle: Bundle, target: TargetInfo, phase: Phase, step: Step, device: str | None = None
) -> Workload:
    """A call of a bundle's function on a cache that is filled with zeros.

    Args:
        bundle: what to run.
        target: one that it is compiled for.
        phase: one that the target has a module of.
        step: sequences, new tokens of each (1 in a decode) and tokens that the cache holds of each already.
        device: IREE device URI; the target's driver if left out.

    Raises:
        BundleError: not exported for this batch size, or its files are not what the manifest says.
        CaptureError: a step that the model or the phase cannot take.
    """
    manifest = bundle.manifest
    info = manifest.function(phase, step.batch)
    function = info.name.rpartition(".")[2]
    longest = min(info.columns or manifest.model.max_seq_len, manifest.model.max_seq_len)
    least, most = (1, 1) if phase == "decode" else (_MIN_PREFILL, longest)
    if not least <= step.tokens <= most:
        raise CaptureError(f"{step.tokens} tokens: a {phase} takes {f'{least} to {most}' if least < most else least}")
    if step.context < 0 or step.context + step.tokens > manifest.model.max_seq_len:
        raise CaptureError(
            f"context {step.context} and {step.tokens} new tokens: this bundle holds 0 to "
            f"{manifest.model.max_seq_len} tokens a sequence"
        )
    entries = max(_MIN_TABLE, manifest.cache.pages_for(step.context + step.tokens))
    pages = step.batch * entries
    cache = "x".join(map(str, (pages + 1, *manifest.cache.page_shape)))
    return Workload(
        module=bundle.checked_module(target, phase),
        function=function,
        inputs=(
            f"{step.batch}x{info.columns or step.tokens}xi32={_TOKEN}",
            f"{step.batch}xi32={step.context}",
            f"{step.batch}xi32={step.tokens}",
            # Page 0 stays behind as the one that padding names.
            f"{step.batch}x{entries}xi32={','.join(map(str, range(1, pages + 1)))}",
            f"{cache}x{manifest.cache.dtype}=0",
        ),
        parameters=(f"{PARAMETER_SCOPE}={bundle.checked_parameters()}",),
        device=device or target.driver,
    )


def check_input(text: str) -> str:
    """An input as IREE's tools take it.

    Raises:
        CaptureError: it is none; the message has examples.
    """
    if not text.startswith("@") and _INPUT.fullmatch(text) is None and not re.fullmatch(r"-?[\d.]+", text):
        raise CaptureError(f"--input {text}: expected a shape, a type and values, such as 4x8xf32=1, or @values.npy")
    return text


def _shape(text: str) -> Shape | None:
    match = _INPUT.fullmatch(text)
    if match is None:
        return None
    return tuple(int(size) for size in match["shape"].split("x") if size)
