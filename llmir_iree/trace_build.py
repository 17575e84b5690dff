"""What a recording needs of the compiler and the plugin: IR of the module that was run, and the machine's roofs."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llmir_iree.bundle import Bundle, Phase, TargetInfo, file_sha256
from llmir_iree.compile import compile_mlir
from llmir_iree.machine import cpu_count, cpu_name
from llmir_iree.params.errors import BundleError, CompileError
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import has_tile16
from llmir_iree.plugins.kernels import definitions
from llmir_iree.plugins.kernels.executables import Kernel
from llmir_iree.plugins.lowering import Preference
from llmir_iree.plugins.pipeline import lower
from llmir_iree.plugins.seam import IMPLEMENTATIONS
from llmir_iree.targets import resolve_target
from llmir_iree.tracing.capture import MachineInfo
from llmir_iree.tracing.op_costs import Kernel as TracedKernel

_CACHE_ITEM_BYTES = {"f16": 2, "bf16": 2}
_EXECUTABLE_FOLDERS = ("flow_executable_", "stream_executable_", "hal_executable_")

# What IREE's backends put beside module.fb: ELF files, PTX, code objects of AMD, SPIR-V.
_BINARY_SUFFIXES = (".so", ".ptx", ".hsaco", ".spv")

# Dumps of whole modules repeat all of a model's ops after every pass; those of single executables are kept always.
_MODULE_DUMP_BYTES = 32 << 20

_PHASE_FLAGS = ("--mlir-print-debuginfo", "--mlir-elide-resource-strings-if-larger=64")


@dataclass(frozen=True)
class LoweredModule:
    """The text that a module is compiled from, and the flags."""

    text: str
    flags: tuple[str, ...]


class CompiledIr:
    """The IR of a module that can be compiled again: an `IrSource` of `llmir_iree.tracing.record`."""

    def __init__(
        self, module: Callable[[], LoweredModule], vmfb: Path, kernels: Mapping[str, TracedKernel] | None = None
    ) -> None:
        """Know what to compile, not before it is asked for.

        Args:
            module: gives the text and the flags.
            vmfb: the module that is run.
            kernels: those in it, by the symbol of their executable.
        """
        self._lower = module
        self._vmfb = vmfb
        self.kernels = kernels or {}

    @cached_property
    def module(self) -> LoweredModule:
        """The text and the flags; raises as `lower_again` does."""
        return self._lower()

    @property
    def portable(self) -> str:
        """The text that the module was compiled from."""
        return self.module.text

    def stream(self) -> str:
        """The module at stream level, with locations that point into `portable`."""
        return compile_stream(self.module)

    def write(self, folder: Path) -> dict[str, str]:
        """Fill the folder `ir` of a capture, see `write_ir`."""
        return write_ir(self.module, folder, self._vmfb)


def lower_again(bundle: Bundle, target: TargetInfo, phase: Phase) -> LoweredModule:
    """Lower a bundle's portable module as it was lowered for a target.

    Raises:
        BundleError: the portable module is missing or was changed.
        CompileError: this version of the plugin lowers it another way.
    """
    info, portable = target.modules[phase], bundle.manifest.portable[phase]
    source = bundle.path(portable.file)
    if not source.is_file() or file_sha256(source) != info.portable_sha256:
        raise BundleError(f"{source}: missing, or not the module that {info.file} was compiled from")
    chosen = {name for names in info.implementations.values() for name in names}
    kernels = {choice.name for choices in IMPLEMENTATIONS.values() for choice in choices if not choice.is_portable}
    preference: Preference = "best" if chosen & kernels else "portable"
    lowered = lower(
        source.read_text(encoding="utf-8"),
        replace(resolve_target(target.target), flags=info.flags),
        preference,
        merged=bundle.manifest.parameters.merged,
        passes=info.passes,
    )
    if lowered.implementations != info.implementations:
        raise CompileError(
            f"{source}: this version lowers it another way than {info.file} was; run llmir-compile again"
        )
    return LoweredModule(lowered.text, info.flags)


def compile_stream(module: LoweredModule) -> str:
    """The stream level of a module, with locations that point into its text.

    Raises:
        CompileError: iree-compile failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "stream.mlir"
        compile_mlir(module.text, output, (*module.flags, "--compile-to=stream", *_PHASE_FLAGS))
        return output.read_text(encoding="utf-8")


def write_ir(module: LoweredModule, folder: Path, vmfb: Path) -> dict[str, str]:
    """Compile a module once more, and fill the folder `ir` of a capture.

    Args:
        module: what to compile.
        folder: to be filled; the head of `llmir_iree.tracing.capture` says with what.
        vmfb: the module that was run; its machine code is taken out of it.

    Returns:
        What was left out, each with the reason.

    Raises:
        CompileError: iree-compile failed.
    """
    folder.mkdir()
    (folder / "portable.mlir").write_text(module.text, encoding="utf-8")
    (folder / "debug.mlir").write_text(_with_locations(module.text), encoding="utf-8")
    phases, tree, binaries = folder / "phases", folder / "tree", folder / "binaries"
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / "module.vmfb"
        compile_mlir(module.text, compiled, (*module.flags, *_PHASE_FLAGS, f"--dump-compilation-phases-to={phases}"))
        flags = (
            # With threads, iree-compile 3.13 was seen to hang while it writes a folder.
            "--mlir-disable-threading",
            "--mlir-print-ir-after-all",
            "--mlir-print-ir-after-change",
            f"--mlir-print-ir-tree-dir={tree}",
            "--mlir-elide-resource-strings-if-larger=64",
            f"--iree-hal-dump-executable-intermediates-to={binaries}",
        )
        compile_mlir(module.text, compiled, (*module.flags, *flags))
    binaries.mkdir(exist_ok=True)
    for bitcode in binaries.glob("*.bc"):  # The same as the .ll beside it.
        bitcode.unlink()
    extract_binaries(vmfb, binaries)
    return _prune(tree)


def extract_binaries(vmfb: Path, folder: Path) -> list[Path]:
    """Take the machine code out of a compiled module, which is a zip file."""
    with zipfile.ZipFile(vmfb) as archive:
        # Names of a file that anyone may have made: none of them may lead out of the folder.
        names = [name for name in archive.namelist() if Path(name).name == name and name.endswith(_BINARY_SUFFIXES)]
        for name in names:
            (folder / name).write_bytes(archive.read(name))
    return [folder / name for name in names]


def known_kernels() -> dict[str, TracedKernel]:
    """The kernels that the plugin injects, by the symbol of their executable."""
    return {f"{kernel.name}_executable": traced for kernel, traced in _kernels()}


def describe_machine(parameters: Path | None, *, is_local: bool) -> MachineInfo:
    """The machine of this process, with its roofs if the device is its CPU, which takes a second or two.

    Args:
        parameters: the archive that the run read, whose pages the bandwidth is measured on.
        is_local: whether the runs were on this machine's cores.
    """
    machine = MachineInfo(cpu=cpu_name(), cores=cpu_count())
    if not is_local:
        return machine
    from llmir_iree.peaks import open_peak_meter

    meter = open_peak_meter()
    if meter is None:
        return machine
    return machine.model_copy(
        update={"bandwidth_bytes_s": meter.bandwidth(parameters), "peak_macs_s": meter.macs()},
    )


def _kernels() -> Iterator[tuple[Kernel, TracedKernel]]:
    def traced(kernel: Kernel, kind: str, element: str | None = None) -> tuple[Kernel, TracedKernel]:
        size = None if element is None else _CACHE_ITEM_BYTES[element]
        return kernel, TracedKernel(kind, kernel.constants, size)

    yield traced(definitions.QUANTIZE, "quantize_activations")
    yield traced(definitions.NORM_QUANTIZE, "norm_quantize")
    yield traced(definitions.ADD_NORM_QUANTIZE, "add_norm_quantize")
    yield traced(definitions.MERGE, "merge_attention")
    yield traced(definitions.MERGE_QUANTIZE, "merge_attention_quantize")
    tiled = {name: weight_format for name, weight_format in FORMATS.items() if has_tile16(name)}
    for name, weight_format in tiled.items():
        yield traced(definitions.multiply_kernel(name), "quantized_matmul" if weight_format.is_quantized else "matmul")
        if weight_format.is_quantized:
            yield traced(definitions.gated_kernel(name), "gated_matmul")
    cache_kernels: dict[str, Callable[[str], Kernel]] = {
        "append_kv": definitions.append_kernel,
        "paged_attention": definitions.attend_kernel,
        "rope_append": definitions.rope_append_kernel,
        "rope_attend": definitions.rope_attend_kernel,
        "rope_append_attend": definitions.rope_append_attend_kernel,
    }
    for kind, make in cache_kernels.items():
        for element in _CACHE_ITEM_BYTES:
            yield traced(make(element), kind, element)


def _with_locations(text: str) -> str:
    """A module with a location at every op: where it stands in the text."""
    from iree.compiler import ir

    with ir.Context():
        try:
            module = ir.Module.parse(text)
        except ir.MLIRError as error:
            raise CompileError(f"the module cannot be read for its locations: {str(error).splitlines()[0]}") from None
        printed: str = module.operation.get_asm(enable_debug_info=True, large_elements_limit=64)
        return printed


def _prune(tree: Path) -> dict[str, str]:
    """Drop dumps of whole modules and functions where they are large."""
    dumps = [
        file
        for file in tree.rglob("*.mlir")
        if not any(part.startswith(_EXECUTABLE_FOLDERS) for part in file.relative_to(tree).parts)
    ]
    nbytes = sum(file.stat().st_size for file in dumps)
    if nbytes <= _MODULE_DUMP_BYTES:
        return {}
    for file in dumps:
        file.unlink()
    for folder in sorted((folder for folder in tree.rglob("*") if folder.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            shutil.rmtree(folder)
    return {
        "ir of passes over the whole module": f"{nbytes >> 20} MiB, too large to keep: ir/phases has the module after "
        "each phase, ir/tree each dispatch after each pass"
    }
