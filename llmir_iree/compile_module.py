"""Compiles a module that no bundle holds, such as another program's export, with what the seam chooses for its ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from llmir_iree.compile import check_cpu, compile_mlir
from llmir_iree.params.errors import CompileError, RequestError
from llmir_iree.plugins.lowering import Preference
from llmir_iree.targets import Target

_BYTECODE = b"ML\xefR"
_MOST_OF_AN_ERROR = 1000


@dataclass(frozen=True)
class CompiledModule:
    """A module that was compiled, and how.

    Attributes:
        file: the `.vmfb`.
        target: what it is compiled for, as users write it.
        driver: the HAL driver that runs it.
        subgroup_size: lanes in step that it is made for; None where that does not matter.
        compiler: the compiler and its version.
        flags: what iree-compile was given.
        passes: the plugin's passes that ran.
        implementations: of every op, how many calls each implementation stands in for.
        left_alone: what was looked at as a match and is not, a line each with the reason.
    """

    file: str
    target: str
    driver: str
    subgroup_size: int | None
    compiler: str
    flags: tuple[str, ...]
    passes: tuple[str, ...]
    implementations: dict[str, dict[str, int]]
    left_alone: tuple[str, ...]


def compile_module(
    source: Path,
    target: Target,
    output: Path,
    extra_flags: Sequence[str] = (),
    implementations: Preference = "best",
    passes: Sequence[str] = (),
    *,
    match: bool = False,
) -> CompiledModule:
    """Compile a file of MLIR, text or bytecode, whose functions are of the torch dialect.

    Args:
        source: the file; it holds `torch.operator "torch.llmir.*"`, or, to be matched, what these stand for.
        target: what to compile for.
        output: the `.vmfb` to write; it appears when it is whole.
        extra_flags: more flags for iree-compile, after those of the target.
        implementations: which implementations may stand in for ops.
        passes: which passes of the plugin run, see `llmir_iree.plugins.pipeline.select_passes`.
        match: whether to look for attention over gathered pages and for 4-bit weights as torch writes them.

    Raises:
        RequestError: there is no such file, or no folder for the output.
        TargetError: a CPU that iree-compile does not know.
        CompileError: it is not MLIR, there is nothing in it to implement, or iree-compile failed.
    """
    from llmir_iree.plugins.pipeline import lower

    if not source.is_file():
        raise RequestError(f"{source}: no such file")
    if output.is_dir() or not output.parent.is_dir():
        raise RequestError(f"{output}: {'is a folder' if output.is_dir() else 'there is no such folder to write to'}")
    flagged = replace(target, flags=(*target.flags, *extra_flags))
    check_cpu(flagged)
    try:
        lowered = lower(_read(source), flagged, implementations, passes=passes, match=match)
    except CompileError as error:
        message = str(error)
        raise CompileError(
            f"{source}: {message[:_MOST_OF_AN_ERROR]}{'...' * (len(message) > _MOST_OF_AN_ERROR)}"
        ) from None
    if not lowered.implementations:
        raise CompileError(f"{source}: {_nothing_found(lowered.left_alone, match=match)}")
    compile_mlir(lowered.text, output, flagged.flags)
    return CompiledModule(
        file=str(output),
        target=target.name,
        driver=target.driver,
        subgroup_size=target.subgroup_size,
        compiler=f"iree-base-compiler {version('iree-base-compiler')}",
        flags=flagged.flags,
        passes=lowered.passes,
        implementations=lowered.implementations,
        left_alone=lowered.left_alone,
    )


def _read(source: Path) -> str | bytes:
    content = source.read_bytes()
    if content.startswith(_BYTECODE):
        return content
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise CompileError("the module is not valid MLIR: neither text nor bytecode") from None


def _nothing_found(left_alone: Sequence[str], *, match: bool) -> str:
    nothing = 'it holds no op of ours (torch.operator "torch.llmir.*"), so there is nothing to put in'
    if not match:
        return f"{nothing}; --match also takes attention over gathered pages and 4-bit weights as torch writes them"
    found = "; ".join(left_alone) if left_alone else "there is neither attention nor a product by unpacked weights"
    return f"{nothing}; of what --match looks for: {found}"
