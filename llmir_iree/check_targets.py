"""Checks what models become on every target, on a machine without a GPU, and prints it as tables.

    python -m llmir_iree.check_targets BUNDLE tinyllama --output docs/targets.md

Modules are compiled whole, their dispatches are listed, and their code is read, assembled or validated. Then every op
of the model is compiled alone, and run where there is a device for it: on llvmpipe, which is Vulkan on the CPU, and on
the CPU itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmir_iree.cli.common import EXIT_ERROR, LlmirCommand

if TYPE_CHECKING:  # Imported when something is checked: they load torch and the compiler.
    from llmir_iree.gpu_code import KernelCode
    from llmir_iree.module_check import ModuleCheck
    from llmir_iree.plugins.calls import LlmirCall
    from llmir_iree.plugins.lowering import Preference
    from llmir_iree.shape_models import ShapeModel

DEFAULT_TARGETS = (
    "llvm-cpu",
    "vulkan:llvmpipe",
    "vulkan:rdna3",
    "metal",
    "cuda:sm_80",
    "cuda:sm_90",
    "cuda:sm_120",
    "rocm:gfx942",
    "rocm:gfx1100",
)

MOST_SECONDS = 120.0
"""That compiling all modules of a target may take."""

MOST_ERROR = 2**-5
"""An error above this is a fault: the CPU's kernels round activations to 8 bits, half of a step in 127; GPUs stay far
below. A kernel that reads a wrong number is off by about one."""


@dataclass(frozen=True)
class OpCheck:
    """An op compiled alone: of several dispatches, instructions are added up, registers and spills are the most."""

    target: str
    op: str
    implementation: str
    dispatches: int | None
    instructions: int | None
    matrix_instructions: int | None
    registers: int | None
    spills: int | None
    error: float | None


@dataclass(frozen=True)
class Checks:
    """Everything that was found out, and what was wrong."""

    modules: list[ModuleCheck]
    ops: list[OpCheck]
    faults: list[str]


def check_targets(
    model: ShapeModel,
    targets: Sequence[str] = DEFAULT_TARGETS,
    preference: Preference = "best",
    device: str | None = None,
    report: Callable[[str], None] = lambda _: None,
    whole: bool = True,
) -> Checks:
    """Check a model on targets; what does not compile or is wrong becomes a fault, and the rest goes on.

    Args:
        model: what to compile.
        targets: names of targets.
        preference: which implementations may be chosen.
        device: on which modules for the targets of its driver run; where it is left out, llvmpipe and the CPU.
        report: gets a line for everything that is done.
        whole: whether to compile the model's modules too, not its ops only.

    Raises:
        TargetError: an unknown target, or a tool that is missing; the message says which package brings it.
    """
    from llmir_iree.module_check import check_modules
    from llmir_iree.params.errors import CompileError
    from llmir_iree.targets import resolve_target

    resolved = {name: resolve_target(name) for name in targets}
    checks = Checks([], [], [])
    tasks = [
        (model, phase, target)
        for target in resolved.values()
        for phase in model.phases_for(prefill_chunks=target.prefill_chunks)
        if whole
    ]
    for (_, phase, target), check in zip(tasks, check_modules(tasks, preference), strict=True):
        if isinstance(check, CompileError):
            checks.faults.append(f"{target.name}: {phase}: {check}")
            continue
        report(f"{target.name}: {phase}: {check.seconds:.0f} s")
        checks.modules.append(check)
        checks.faults.extend(f"{target.name}: {phase}: {fault}" for fault in check.faults)
    for name in targets:
        seconds = sum(check.seconds for check in checks.modules if check.target == name)
        if seconds > MOST_SECONDS:
            checks.faults.append(f"{name}: compiling takes {seconds:.0f} s")
    for name, target in resolved.items():
        texts = [model.phases[phase].text for phase in model.phases_for(prefill_chunks=target.prefill_chunks)]
        for op in _check_ops(name, texts, preference, device, report):
            if isinstance(op, str):
                checks.faults.append(op)
            else:
                checks.ops.append(op)
                checks.faults.extend(_faults(op))
    return checks


def _faults(check: OpCheck) -> Iterator[str]:
    if check.error is not None and not check.error <= MOST_ERROR:
        yield f"{check.target}: {check.op}: off by {check.error:.1e} of the largest value"
    if check.spills and "portable" not in check.implementation:
        yield f"{check.target}: {check.op}: {check.implementation} spills {check.spills} bytes"


def _check_ops(
    name: str, texts: Sequence[str], preference: Preference, device: str | None, report: Callable[[str], None]
) -> Iterator[OpCheck | str]:
    """A check of every op of portable modules, or what went wrong with it; they are compiled side by side."""
    from llmir_iree.machine import cpu_count
    from llmir_iree.op_runs import describe, distinct_calls, measure_error
    from llmir_iree.params.errors import LlmirError, TargetError

    uri = _device_for(name, device)
    calls = {call.symbol: call for text in texts for call in distinct_calls(text)}
    with tempfile.TemporaryDirectory(prefix="llmir-check-") as scratch, ThreadPoolExecutor(cpu_count()) as pool:
        compiled = {
            symbol: pool.submit(_compile_op, call, name, preference, Path(scratch) / symbol)
            for symbol, call in calls.items()
        }
        for symbol, call in calls.items():
            report(f"{name}: {describe(call)}")
            try:
                implementation, code, module = compiled[symbol].result()
                error = None if uri is None else measure_error(call, module, uri)
            except TargetError:
                pool.shutdown(cancel_futures=True)
                raise
            except LlmirError as failure:
                yield f"{name}: {describe(call)}: {failure}"
                continue
            registers = [kernel.registers for kernel in code if kernel.registers is not None]
            spills = [kernel.spills for kernel in code if kernel.spills is not None]
            yield OpCheck(
                target=name,
                op=describe(call),
                implementation=implementation,
                dispatches=len(code) or None,
                instructions=sum(kernel.instructions for kernel in code) or None,
                matrix_instructions=sum(kernel.matrix_instructions for kernel in code) if code else None,
                registers=max(registers, default=None),
                spills=max(spills, default=None),
                error=error,
            )


def _compile_op(
    call: LlmirCall, name: str, preference: Preference, folder: Path
) -> tuple[str, tuple[KernelCode, ...], Path]:
    """Compile one call into a new folder: its implementation, its code, and the module."""
    from llmir_iree.compile import compile_mlir
    from llmir_iree.gpu_code import read_code
    from llmir_iree.module_check import dump_flags
    from llmir_iree.op_runs import build_module
    from llmir_iree.targets import resolve_target

    target = resolve_target(name)
    module = build_module(call, target, preference)
    folder.mkdir()
    output, dump = folder / "module.vmfb", folder / "code"
    compile_mlir(module.text, output, (*target.flags, *dump_flags(target, dump)))
    code = () if target.family == "llvm-cpu" else tuple(read_code(dump, target))
    return module.implementation, code, output


def _device_for(name: str, device: str | None) -> str | None:
    """A device here that runs a target's modules, or None."""
    import iree.runtime as rt

    from llmir_iree.devices import driver_of, subgroups_of
    from llmir_iree.params.errors import TargetError
    from llmir_iree.targets import resolve_target

    target = resolve_target(name)
    if device is not None:
        return device if driver_of(device) == target.driver else None
    if target.driver.startswith("local"):
        return target.driver
    if target.chip != "llvmpipe" or target.driver not in rt.query_available_drivers():
        return None
    try:
        found = rt.get_driver(target.driver).query_available_devices()
        uris = [f"vulkan://{info['path']}" for info in found if "llvmpipe" in info["name"]]
        fitting = [uri for uri in uris if (sizes := subgroups_of(uri)) is None or sizes.has(target.subgroup_size or 0)]
    except (RuntimeError, TargetError):
        return None
    return fitting[0] if fitting else None


def as_markdown(checks: Checks, title: str) -> str:
    """The tables of a report."""
    modules = _table(
        ("target", "module", "seconds", "of cores", "KiB", "dispatches", "most registers", "spilling", "read by"),
        "ll>>>>>ll",
        (
            (
                check.target,
                check.phase,
                f"{check.seconds:.1f}",
                f"{check.cpu_seconds:.1f}",
                f"{check.nbytes / 1024:.0f}",
                " + ".join(str(function.total) for function in check.functions),
                _cell(check.most_registers),
                ", ".join(check.spilling) or ("-" if check.most_registers is None else "none"),
                check.read_by or "-",
            )
            for check in checks.modules
        ),
    )
    dispatches = _table(
        ("target", "function", "dispatches"),
        "lll",
        (
            (check.target, function.function, ", ".join(f"{count} {kind}" for kind, count in function.kinds.items()))
            for check in checks.modules
            for function in check.functions
        ),
    )
    ops = _table(
        ("target", "op", "implementation", "dispatches", "instructions", "of matrices", "registers", "spills", "error"),
        "lll>>>>>>",
        (
            (
                check.target,
                check.op,
                check.implementation,
                _cell(check.dispatches),
                _cell(check.instructions),
                _cell(check.matrix_instructions),
                _cell(check.registers),
                _cell(check.spills),
                "not run" if check.error is None else f"{check.error:.1e}",
            )
            for check in checks.ops
        ),
    )
    whole = ["### Modules", *modules, "### Dispatches", *dispatches] if checks.modules else []
    faults = [f"- {fault}" for fault in checks.faults] or ["None."]
    parts = [f"## {title}", *whole, "### Ops", *ops, "### Faults", *faults]
    return "\n".join(f"\n{part}\n" if part.startswith("#") else part for part in parts).strip() + "\n"


def _table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; `>` aligns a column to the right."""
    rule = ["--:" if side == ">" else "---" for side in alignment]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


_HEAD = """# What becomes of models on each target

Written by `make check-targets`, on a machine without a GPU; a person reads it after a change of kernels or of the
compiler. It exports each model once and compiles that for every target: SmolLM2-135M out of its bundle, and TinyLlama's
shapes without weights, as a Q4_0 file of llama.cpp's would have them. `make check-targets CHECK_ARGS="--target metal"`
checks some of them.

Modules: `seconds` is the time that iree-compile took on {cores} cores of {cpu}, one module a core, with whatever else
ran there, and `of cores` what it computed in that time; all modules of a target may take {most_seconds:.0f} s together.
Registers and spills of cuda are what ptxas says, those of rocm stand in the metadata of the code; on Vulkan and Metal
the driver assigns registers. Of dispatches there are as many as all functions make in a call each.

Dispatches: those of each function, by kind. Ours are append_kv, paged_attention, merge_attention, quantized_matmul and,
on CPUs, what is fused around them; the others are the compiler's own. What is "of weights" reads a matrix, and is the
compiler's: `matmul_like` where matrix instructions multiply it, others look up the embedding. None may write a byte or
more for every weight that it reads, or for every key of the pages that the table names, and nothing may compute in
16-bit floats but products of matrix instructions.

Ops: an error is the largest difference from the op in torch over the largest number that it gives; "not run" means that
there was no such device.
"""


@click.command(cls=LlmirCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--target", "targets", multiple=True, default=DEFAULT_TARGETS, help="Target to check; repeatable.")
@click.option(
    "--implementations",
    "preference",
    default="best",
    type=click.Choice(["best", "kernels", "portable"]),
    help="As of llmir-compile.",
)
@click.option("--device", help="Where to run modules of its driver.  [default: llvmpipe and the CPU]")
@click.option("--ops-only", is_flag=True, help="Leave out the model's whole modules.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Markdown file to write.  [default: stdout]")
@click.pass_context
def main(
    ctx: click.Context,
    models: tuple[str, ...],
    targets: tuple[str, ...],
    preference: Preference,
    device: str | None,
    ops_only: bool,
    output: Path | None,
) -> None:
    """Compile each MODEL for every target, read the code, run what can be run; exit code 1 if something is wrong.

    A MODEL is a bundle, or the name of a model's shapes, such as tinyllama.
    """
    import os

    from llmir_iree.machine import cpu_name
    from llmir_iree.shape_models import read_model

    parts = [_HEAD.format(cores=os.cpu_count(), cpu=cpu_name(), most_seconds=MOST_SECONDS)]
    faults: list[str] = []
    for source in models:
        click.echo(f"{source}:", err=True)
        model = read_model(source)
        checks = check_targets(
            model, targets, preference, device, lambda line: click.echo(line, err=True), whole=not ops_only
        )
        parts.append(as_markdown(checks, model.name))
        faults.extend(f"{model.name}: {fault}" for fault in checks.faults)
    text = "\n".join(parts)
    if output is None:
        click.echo(text, nl=False)
    else:
        partial = output.with_name(output.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    for fault in faults:
        click.echo(fault, err=True)
    if faults:
        ctx.exit(EXIT_ERROR - 1)


if __name__ == "__main__":
    main()
