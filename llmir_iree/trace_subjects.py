"""Finds out what a user wants to record: a bundle, one of its modules, another compiled module, or MLIR text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmir_iree.bundle import MANIFEST_NAME, Bundle, Phase, TargetInfo
from llmir_iree.compile import compile_mlir
from llmir_iree.params.errors import BundleError, RequestError
from llmir_iree.targets import resolve_target
from llmir_iree.trace_build import CompiledIr, LoweredModule, describe_machine, known_kernels, lower_again
from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.op_costs import Step
from llmir_iree.tracing.record import Subject
from llmir_iree.tracing.workload import Workload, bundle_workload, check_input

DEFAULT_CONTEXT = 128
DEFAULT_TOKENS = 128
_DEFAULT_TARGET = "llvm-cpu"
_TEXT_SUFFIX = ".mlir"


@dataclass(frozen=True)
class SubjectOptions:
    """What to record, as the user named it.

    Of a bundle: `phase` (decode if None), `context` tokens in the cache, `batch` sequences, new `tokens` of each in a
    prefill. Of another module: `function` (its only one if None), `inputs` and `parameters`. `flags` go to iree-compile
    where `path` is MLIR text.
    """

    path: Path
    phase: Phase | None = None
    context: int | None = None
    batch: int = 1
    tokens: int | None = None
    function: str | None = None
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    target: str | None = None
    device: str | None = None
    flags: tuple[str, ...] = ()


@contextmanager
def open_subject(options: SubjectOptions) -> Iterator[Subject]:
    """What to record; MLIR text is compiled for as long as the block lasts.

    Raises:
        CaptureError: options that do not go together, or no such function.
        BundleError: a bundle that is damaged, or was not exported or compiled for what is asked.
        CompileError: the text does not compile.
    """
    path = options.path
    if not path.exists():
        raise CaptureError(f"{path}: no such bundle, module or MLIR file")
    if options.flags and path.suffix != _TEXT_SUFFIX:
        raise RequestError(f"{' '.join(options.flags)}: flags of iree-compile go with a {_TEXT_SUFFIX} file only")
    if path.suffix == _TEXT_SUFFIX:
        with tempfile.TemporaryDirectory() as folder:
            yield _text_subject(options, Path(folder) / f"{path.stem}.vmfb")
    elif path.is_dir() or (options.function is None and _is_in_bundle(path)):
        yield _bundle_subject(options)
    else:
        yield _module_subject(options, path)


def find_ir(path: Path, target_name: str | None) -> dict[str, CompiledIr]:
    """Where the IR of a bundle's modules comes from, by phase; nothing is compiled before it is asked for.

    Raises:
        BundleError: not a bundle, or no such target.
    """
    bundle, implied = Bundle.containing(path)
    target = bundle.target(target_name or implied)
    return {phase: _module_ir(bundle, target, phase) for phase in target.modules}


def _module_ir(bundle: Bundle, target: TargetInfo, phase: Phase) -> CompiledIr:
    vmfb = bundle.path(target.modules[phase].file)
    return CompiledIr(partial(lower_again, bundle, target, phase), vmfb, known_kernels)


def _is_in_bundle(module: Path) -> bool:
    return (module.resolve().parent.parent / MANIFEST_NAME).is_file()


def _bundle_subject(options: SubjectOptions) -> Subject:
    if options.inputs or options.parameters or options.function is not None:
        raise RequestError("--function, --input and --parameters are for other modules; a bundle's are known")
    bundle, target_name = Bundle.containing(options.path)
    target = bundle.target(options.target or target_name)
    phase = options.phase or _phase_of(bundle, options.path) or "decode"
    if phase == "prefill":
        phase = target.prefill_phase
    context = options.context if options.context is not None else DEFAULT_CONTEXT if phase == "decode" else 0
    if phase == "decode" and options.tokens not in (None, 1):
        raise RequestError(
            f"--tokens {options.tokens}: a decode takes one token a sequence; --phase prefill takes more"
        )
    tokens = 1 if phase == "decode" else options.tokens or DEFAULT_TOKENS
    step = Step(options.batch, tokens, context)
    workload = bundle_workload(bundle, target, phase, step, options.device)
    archive = bundle.path(bundle.manifest.parameters.file)
    return Subject(
        name=str(options.path),
        workload=workload,
        phase=phase,
        step=step,
        target=target.target,
        flags=target.modules[phase].flags,
        passes=target.modules[phase].passes,
        ir=_module_ir(bundle, target, phase),
        machine=partial(describe_machine, archive, is_local=workload.is_local),
    )


def _phase_of(bundle: Bundle, module: Path) -> Phase | None:
    """The phase that a `.vmfb` of a bundle is; None for the bundle itself."""
    for target in bundle.manifest.targets.values():
        for phase, info in target.modules.items():
            if bundle.path(info.file).resolve() == module.resolve():
                return phase
    return None


def _text_subject(options: SubjectOptions, vmfb: Path) -> Subject:
    target = resolve_target(options.target or _DEFAULT_TARGET)
    module = LoweredModule(_read_text(options.path), (*target.flags, *options.flags))
    compile_mlir(module.text, vmfb, module.flags)
    return _module_subject(options, vmfb, target.name, module, target.driver)


def _module_subject(
    options: SubjectOptions,
    vmfb: Path,
    target: str | None = None,
    module: LoweredModule | None = None,
    driver: str = "local-task",
) -> Subject:
    if options.phase is not None or options.context is not None or options.tokens is not None or options.batch != 1:
        raise RequestError(f"{options.path}: --phase, --context, --batch and --tokens are for bundles only")
    workload = Workload(
        module=vmfb,
        function=_find_function(vmfb, options.path, options.function),
        inputs=tuple(map(check_input, options.inputs)),
        parameters=options.parameters,
        device=options.device or driver,
    )
    return Subject(
        name=str(options.path),
        workload=workload,
        target=target,
        flags=module.flags if module is not None else (),
        ir=CompiledIr(lambda: module, vmfb) if module is not None else None,
        machine=partial(describe_machine, None, is_local=workload.is_local),
    )


def _find_function(vmfb: Path, path: Path, asked: str | None) -> str:
    """The function of a module that is asked for, or its only one."""
    names = _function_names(vmfb)
    known = ", ".join(names) or "none"
    if asked is None and len(names) == 1:
        return names[0]
    if asked is None:
        raise CaptureError(f"{path}: name one of its functions with --function: {known}")
    if asked not in names:
        raise CaptureError(f"{path}: no function {asked}; it has {known}")
    return asked


def _function_names(vmfb: Path) -> Sequence[str]:
    """Functions that a module exports for callers; not its initialiser, nor the forms of functions that take fences."""
    import iree.runtime as rt

    try:
        module = rt.VmModule.copy_buffer(rt.VmInstance(), vmfb.read_bytes())
    except (RuntimeError, ValueError) as error:
        raise BundleError(f"{vmfb}: not a compiled module: {str(error).splitlines()[0]}") from None
    return [name for name in module.function_names if not name.startswith("__") and not name.endswith("$async")]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as text: {error}") from None
