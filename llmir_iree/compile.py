"""The compile driver: a portable module through the plugin's passes and iree-compile to a `.vmfb` in the bundle."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from llmir_iree.bundle import Bundle, ModuleInfo, Phase, TargetInfo, file_sha256
from llmir_iree.params.errors import BundleError, CompileError, TargetError
from llmir_iree.plugins.lowering import Preference
from llmir_iree.targets import Target

# A compile of a large model takes a minute or two; one that takes this long will not end.
TIMEOUT_S = 1800
_STDERR_LINES = 12

# Where iree-compile leaves the IR until it is packed.
_TREE_NAME = "tree"

_UNKNOWN_CPU = re.compile(r"Unknown CPU for target architecture (\S+)\.\nList of accepted CPUs: (.+)")

# Only what changed, and no constants: of a model's weights nothing is left, of a table of its own the shape.
# With threads, iree-compile 3.13 was seen to hang while it writes a folder.
_DUMP_FLAGS = (
    "--mlir-disable-threading",
    "--mlir-print-ir-after-all",
    "--mlir-print-ir-after-change",
    "--mlir-elide-resource-strings-if-larger=64",
    "--mlir-elide-elementsattrs-if-larger=64",
)


def compile_bundle(
    bundle: Bundle,
    target: Target,
    extra_flags: Sequence[str] = (),
    implementations: Preference = "best",
    passes: Sequence[str] = (),
    dump_ir: Path | None = None,
) -> TargetInfo:
    """Compile prefill and decode for a target, side by side, and enter the modules in the manifest.

    Args:
        bundle: an exported bundle; its portable modules are read, and checked against the manifest.
        target: what to compile for.
        extra_flags: more flags for iree-compile, after those of the target.
        implementations: which implementations may stand in for the model's ops.
        passes: which passes of the plugin run, see `llmir_iree.plugins.pipeline.select_passes`.
        dump_ir: a folder to make, for the IR after each pass of iree-compile that changed something, a folder a phase
            in it. The modules are the same with it as without. Until it is packed, it takes a hundred times the room.

    Returns:
        What the manifest now says of the target.

    Raises:
        BundleError: a portable module is missing or was changed.
        TargetError: a CPU that iree-compile does not know.
        CompileError: iree-compile failed; the message tells how to repeat it. Or a pass that does not exist. Or the
            folder for the IR is there already.
    """
    flagged = replace(target, flags=(*target.flags, *extra_flags))
    check_cpu(flagged)
    folder = bundle.path(target.folder)
    folder.mkdir(exist_ok=True)
    phases = bundle.manifest.phases_for(prefill_chunks=target.prefill_chunks)
    # What the manifest tells of stays as it is until all went well.
    with (
        tempfile.TemporaryDirectory(prefix=".compiling-", dir=folder) as scratch,
        new_folder(dump_ir, "the IR") if dump_ir else nullcontext() as dump,
        ThreadPoolExecutor(len(phases)) as pool,
    ):
        compiled = pool.map(
            lambda phase: _compile_phase(bundle, phase, flagged, implementations, passes, Path(scratch), dump), phases
        )
        modules = dict(zip(phases, compiled, strict=True))
        for module in modules.values():
            file = bundle.path(module.file)
            (Path(scratch) / file.name).replace(file)
    info = TargetInfo(
        target=target.name,
        folder=target.folder,
        driver=target.driver,
        compiler=f"iree-base-compiler {version('iree-base-compiler')}",
        modules=modules,
        subgroup_size=target.subgroup_size,
    )
    targets = {**bundle.manifest.targets, target.name: info}
    bundle.save(bundle.manifest.model_copy(update={"targets": targets}))
    return info


def read_portable(bundle: Bundle, phase: Phase) -> str:
    """The portable module of a phase.

    Raises:
        BundleError: it is missing or was changed.
    """
    portable = bundle.manifest.portable[phase]
    source = bundle.path(portable.file)
    if not source.is_file() or file_sha256(source) != portable.sha256:
        raise BundleError(f"{source}: missing, or not the module that the manifest describes; export the bundle again")
    return source.read_text(encoding="utf-8")


def compile_mlir(text: str, output: Path, flags: Iterable[str]) -> None:
    """Run iree-compile on MLIR text; the output appears only when it is whole.

    Raises:
        CompileError: iree-compile failed or did not end; the message holds the command and the end of its stderr, and
            the input is kept for repeating it.
    """
    partial = output.with_name(output.name + ".partial")
    with tempfile.NamedTemporaryFile("w", suffix=".mlir", prefix="llmir-", delete=False) as stream:
        stream.write(text)
    source = Path(stream.name)
    command = [compiler(), str(source), "-o", str(partial), *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise CompileError(_failure(command, f"exit code {done.returncode}", done.stderr))
        partial.replace(output)
    except subprocess.TimeoutExpired:
        raise CompileError(_failure(command, f"no end after {TIMEOUT_S} s", "")) from None
    finally:
        partial.unlink(missing_ok=True)
    source.unlink(missing_ok=True)


def compiler() -> str:
    """Path of iree-compile itself.

    The driver script that pip installs leaves the real compiler running when it is killed.
    """
    from iree.compiler.tools.binaries import find_tool

    return str(Path(find_tool("iree-compile")).resolve())


def check_cpu(target: Target) -> None:
    """Refuse a CPU that the compiler does not know: it would warn, and compile for none in particular.

    Raises:
        TargetError: it is not known; the message lists those that are.
    """
    if target.family != "llvm-cpu" or target.chip in ("host", "generic"):
        return
    command = [compiler(), "-", "-o", os.devnull, "--compile-to=preprocessing", *target.flags]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    match = _UNKNOWN_CPU.search(done.stderr)
    if match is not None:
        architecture, known = match.groups()
        raise TargetError(f"target {target.name!r}: unknown chip; known for {architecture}: generic, {known}")


@contextmanager
def new_folder(folder: Path, contents: str) -> Iterator[Path]:
    """A folder beside that which is asked for, which takes its place when all went well.

    Raises:
        CompileError: there is one of that name.
    """
    if folder.exists():
        raise CompileError(f"{folder}: is there already; name a new folder for {contents}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _compile_phase(
    bundle: Bundle,
    phase: Phase,
    target: Target,
    implementations: Preference,
    passes: Sequence[str],
    folder: Path,
    dump: Path | None,
) -> ModuleInfo:
    """Compile a phase into a folder, and tell of it as if it stood in its place."""
    from llmir_iree.plugins.pipeline import lower
    from llmir_iree.tracing.capture import PASSES_NAME
    from llmir_iree.tracing.ir_dump import pack_tree
    from llmir_iree.tracing.recorded_modules import MODULE_NAME

    merged = bundle.manifest.parameters.merged
    lowered = lower(read_portable(bundle, phase), target, implementations, merged=merged, passes=passes)
    output = folder / f"{phase}.vmfb"
    dump_flags: tuple[str, ...] = ()
    if dump is not None:
        (dump / phase).mkdir()  # iree-compile makes one folder, but none above it.
        dump_flags = (*_DUMP_FLAGS, f"--mlir-print-ir-tree-dir={dump / phase / _TREE_NAME}")
    compile_mlir(lowered.text, output, (*target.flags, *dump_flags))
    module = ModuleInfo(
        file=f"{target.folder}/{output.name}",
        sha256=file_sha256(output),
        flags=target.flags,
        passes=lowered.passes,
        implementations=lowered.implementations,
        portable_sha256=bundle.manifest.portable[phase].sha256,
    )
    if dump is not None:
        pack_tree(dump / phase / _TREE_NAME, dump / phase / PASSES_NAME)
        shutil.rmtree(dump / phase / _TREE_NAME)
        (dump / phase / MODULE_NAME).write_text(module.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return module


def _failure(command: list[str], reason: str, stderr: str) -> str:
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if "error:" in line] or lines
    detail = " | ".join(line.strip() for line in errors[:_STDERR_LINES])
    return f"iree-compile: {reason}: {detail or 'no message'} (repeat with: {shlex.join(command)})"
