"""The compile driver: a portable module through the plugin's passes and iree-compile to a `.vmfb` in the bundle."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from llmir_iree.bundle import PHASES, Bundle, ModuleInfo, Phase, TargetInfo, file_sha256
from llmir_iree.params.errors import BundleError, CompileError
from llmir_iree.plugins.lowering import Preference
from llmir_iree.targets import Target

# A compile of a large model takes a minute or two; one that takes this long will not end.
TIMEOUT_S = 1800
_STDERR_LINES = 12

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
            in it. The modules are the same with it as without.

    Returns:
        What the manifest now says of the target.

    Raises:
        BundleError: a portable module is missing or was changed.
        CompileError: iree-compile failed; the message tells how to repeat it. Or a pass that does not exist. Or the
            folder for the IR is there already.
    """
    folder = bundle.path(target.folder)
    folder.mkdir(exist_ok=True)
    flagged = replace(target, flags=(*target.flags, *extra_flags))
    with _new_folder(dump_ir) as dump, ThreadPoolExecutor(len(PHASES)) as pool:
        compiled = pool.map(lambda phase: _compile_phase(bundle, phase, flagged, implementations, passes, dump), PHASES)
        modules = dict(zip(PHASES, compiled, strict=True))
    info = TargetInfo(
        target=target.name,
        folder=target.folder,
        driver=target.driver,
        compiler=f"iree-base-compiler {version('iree-base-compiler')}",
        modules=modules,
    )
    targets = {**bundle.manifest.targets, target.name: info}
    bundle.save(bundle.manifest.model_copy(update={"targets": targets}))
    return info


def compile_mlir(text: str, output: Path, flags: Iterable[str]) -> None:
    """Run iree-compile on MLIR text; the output appears only when it is whole.

    Raises:
        CompileError: iree-compile failed or did not end; the message holds the command and the end of its stderr, and
            the input is kept for repeating it.
    """
    from iree.compiler.tools.binaries import find_tool

    # The driver script that pip installs leaves the real compiler running when it is killed; this is the real one.
    compiler = str(Path(find_tool("iree-compile")).resolve())
    partial = output.with_name(output.name + ".partial")
    with tempfile.NamedTemporaryFile("w", suffix=".mlir", prefix="llmir-", delete=False) as stream:
        stream.write(text)
    source = Path(stream.name)
    command = [compiler, str(source), "-o", str(partial), *flags]
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


@contextmanager
def _new_folder(folder: Path | None) -> Iterator[Path | None]:
    """A folder beside that which is asked for, which takes its place when all went well."""
    if folder is None:
        yield None
        return
    if folder.exists():
        raise CompileError(f"{folder}: is there already; name a new folder for the IR")
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
    dump: Path | None,
) -> ModuleInfo:
    from llmir_iree.plugins.pipeline import lower
    from llmir_iree.tracing.ir_dump import compress_tree
    from llmir_iree.tracing.recorded_modules import MODULE_NAME

    portable = bundle.manifest.portable[phase]
    source = bundle.path(portable.file)
    if not source.is_file() or file_sha256(source) != portable.sha256:
        raise BundleError(f"{source}: missing, or not the module that the manifest describes; export the bundle again")
    merged = bundle.manifest.parameters.merged
    lowered = lower(source.read_text(encoding="utf-8"), target, implementations, merged=merged, passes=passes)
    file = f"{target.folder}/{phase}.vmfb"
    dump_flags = () if dump is None else (*_DUMP_FLAGS, f"--mlir-print-ir-tree-dir={dump / phase}")
    compile_mlir(lowered.text, bundle.path(file), (*target.flags, *dump_flags))
    module = ModuleInfo(
        file=file,
        sha256=file_sha256(bundle.path(file)),
        flags=target.flags,
        passes=lowered.passes,
        implementations=lowered.implementations,
        portable_sha256=portable.sha256,
    )
    if dump is not None:
        compress_tree(dump / phase)
        (dump / phase / MODULE_NAME).write_text(module.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return module


def _failure(command: list[str], reason: str, stderr: str) -> str:
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if "error:" in line] or lines
    detail = " | ".join(line.strip() for line in errors[:_STDERR_LINES])
    return f"iree-compile: {reason}: {detail or 'no message'} (repeat with: {shlex.join(command)})"
