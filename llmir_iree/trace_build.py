"""What a recording needs of the compiler and the plugin: IR of the module that was run, and the machine's roofs."""

from __future__ import annotations

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
from llmir_iree.params.layouts import GROUP, has_tile16
from llmir_iree.plugins.gpu.templates import named_kernels
from llmir_iree.plugins.kernels import definitions
from llmir_iree.plugins.kernels.executables import Kernel
from llmir_iree.plugins.lowering import Preference
from llmir_iree.plugins.pipeline import lower
from llmir_iree.plugins.seam import IMPLEMENTATIONS
from llmir_iree.targets import resolve_target
from llmir_iree.tracing.capture import PASSES_NAME, MachineInfo
from llmir_iree.tracing.ir_dump import pack_tree
from llmir_iree.tracing.op_costs import Kernel as TracedKernel

_CACHE_ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
_CPU_CACHE_DTYPES = ("f16", "bf16")

# Of each template of GPU kernels: what a dispatch of it does, and what it is passed.
_GPU_KERNELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "append_kv": ("append_kv", ("pages", "seq", "entries", "layer")),
    "decode_attention": ("paged_attention", ("pages", "entries", "layer", "splits")),
    "prefill_attention": ("paged_attention", ("pages", "seq", "entries", "layer")),
    "merge_attention": ("merge_attention", ("splits",)),
    "multiply_few": ("quantized_matmul", ()),
    "multiply_many": ("quantized_matmul", ("rows",)),
}

# What IREE's backends put beside module.fb: ELF files, PTX, code objects of AMD, SPIR-V.
_BINARY_SUFFIXES = (".so", ".ptx", ".hsaco", ".spv")

_PHASE_FLAGS = ("--mlir-print-debuginfo", "--mlir-elide-resource-strings-if-larger=64")


@dataclass(frozen=True)
class LoweredModule:
    """The text that a module is compiled from, and the flags."""

    text: str
    flags: tuple[str, ...]


class CompiledIr:
    """The IR of a module that can be compiled again: an `IrSource` of `llmir_iree.tracing.record`."""

    def __init__(
        self,
        module: Callable[[], LoweredModule],
        vmfb: Path,
        kernels: Callable[[], Mapping[str, TracedKernel]] = dict,
    ) -> None:
        """Know what to compile, not before it is asked for.

        Args:
            module: gives the text and the flags.
            vmfb: the module that is run.
            kernels: gives those in it, by the symbol of their executable, once it is lowered.
        """
        self._lower = module
        self._vmfb = vmfb
        self._kernels = kernels

    @cached_property
    def module(self) -> LoweredModule:
        """The text and the flags; raises as `lower_again` does."""
        return self._lower()

    @cached_property
    def kernels(self) -> Mapping[str, TracedKernel]:
        """The kernels in it, by the symbol of their executable; raises as `lower_again` does."""
        assert self.module
        return self._kernels()

    @property
    def portable(self) -> str:
        """The text that the module was compiled from."""
        return self.module.text

    def stream(self) -> str:
        """The module at stream level, with locations that point into `portable`."""
        return compile_stream(self.module)

    def write(self, folder: Path) -> None:
        """Fill the folder `ir` of a capture, see `write_ir`."""
        write_ir(self.module, folder, self._vmfb)


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
    preferences: tuple[Preference, ...] = ("best", "kernels", "formulations") if chosen & kernels else ("portable",)
    for preference in preferences:
        lowered = lower(
            source.read_text(encoding="utf-8"),
            replace(resolve_target(target.target), flags=info.flags),
            preference,
            merged=bundle.manifest.parameters.merged,
            passes=info.passes,
        )
        if lowered.implementations == info.implementations:
            return LoweredModule(lowered.text, info.flags)
    raise CompileError(f"{source}: this version lowers it another way than {info.file} was; run llmir-compile again")


def compile_stream(module: LoweredModule) -> str:
    """The stream level of a module, with locations that point into its text.

    Raises:
        CompileError: iree-compile failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "stream.mlir"
        compile_mlir(module.text, output, (*module.flags, "--compile-to=stream", *_PHASE_FLAGS))
        return output.read_text(encoding="utf-8")


def write_ir(module: LoweredModule, folder: Path, vmfb: Path) -> None:
    """Compile a module once more, and fill the folder `ir` of a capture.

    Args:
        module: what to compile.
        folder: to be filled; the head of `llmir_iree.tracing.capture` says with what.
        vmfb: the module that was run; its machine code is taken out of it.

    Raises:
        CompileError: iree-compile failed.
    """
    folder.mkdir()
    (folder / "portable.mlir").write_text(module.text, encoding="utf-8")
    (folder / "debug.mlir").write_text(_with_locations(module.text), encoding="utf-8")
    phases, binaries = folder / "phases", folder / "binaries"
    # Not where temporary files go, which may be memory: unpacked, the dumps of a model are gigabytes.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree = Path(scratch) / "tree"
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
        pack_tree(tree, folder / PASSES_NAME)
    binaries.mkdir(exist_ok=True)
    for bitcode in binaries.glob("*.bc"):  # The same as the .ll beside it.
        bitcode.unlink()
    extract_binaries(vmfb, binaries)


def extract_binaries(vmfb: Path, folder: Path) -> list[Path]:
    """Take the machine code out of a compiled module, which is a zip file."""
    with zipfile.ZipFile(vmfb) as archive:
        # Names of a file that anyone may have made: none of them may lead out of the folder.
        names = [name for name in archive.namelist() if Path(name).name == name and name.endswith(_BINARY_SUFFIXES)]
        for name in names:
            (folder / name).write_bytes(archive.read(name))
    return [folder / name for name in names]


def known_kernels() -> dict[str, TracedKernel]:
    """The kernels that the plugin injects, by the symbol of their executable.

    Those for GPUs are made for the sizes of a model: of these, all that were lowered in this process.
    """
    return {f"{kernel.name}_executable": traced for kernel, traced in _kernels()} | dict(_gpu_kernels())


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
        update={"bandwidth_bytes_s": meter.bandwidth(parameters).best, "peak_macs_s": meter.macs().best},
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
        for element in _CPU_CACHE_DTYPES:
            yield traced(make(element), kind, element)


def _gpu_kernels() -> Iterator[tuple[str, TracedKernel]]:
    for name, values in named_kernels().items():
        stem, weight_format = str(values["stem"]), values.get("format")
        kind, constants = _GPU_KERNELS.get(stem.removesuffix(f"_{weight_format}"), ("", ()))
        if not kind:
            continue
        sizes = {key: value for key, value in values.items() if isinstance(value, int)}
        if weight_format is not None:
            kind = "quantized_matmul" if FORMATS[str(weight_format)].is_quantized else "matmul"
            sizes |= {"columns": sizes["out_features"], "depth": sizes["groups"] * GROUP}
        item_bytes = None if kind == "merge_attention" else _CACHE_ITEM_BYTES.get(str(values.get("element")))
        yield name, TracedKernel(kind, constants, item_bytes, sizes)


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
