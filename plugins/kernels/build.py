"""Compiles the kernels: to freestanding objects for every instruction set, and to programs that tests run.

The compiler is the clang inside the `ziglang` package, which brings every target along; it is needed to build the
wheel, not to use it.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent

OBJECTS_FOLDER = "objects"
"""Where a wheel holds the objects, beside the sources."""

COMPILER_VERSION = "0.17.1"
"""Of the `ziglang` package, the one that pyproject.toml names."""

# The compiler may contract a product and a sum within one expression: the kernels count on it, and separate what must
# not be. Freestanding keeps it from turning loops into calls of memcpy.
_FLAGS = ("-std=c17", "-O3", "-ffreestanding", "-ffp-contract=on", "-fno-math-errno", "-Wall", "-Wextra", "-Werror")
_FREESTANDING_FLAGS = ("-fno-stack-protector", "-fno-sanitize=all", "-fno-asynchronous-unwind-tables", "-g0")

# Registers that belong to some of the systems on which the same object runs.
_RESERVED = {"aarch64": ("-ffixed-x18",)}


class KernelBuildError(Exception):
    """A kernel does not compile, or its object is not freestanding."""


@dataclass(frozen=True)
class Variant:
    """An instruction set that kernels are compiled for.

    `cpu` is what the compiler is told; `features` are those of LLVM's names that a processor must have to run them.
    """

    name: str
    architecture: str
    cpu: str
    features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.name.startswith(self.architecture):
            raise ValueError(f"variant {self.name} must be named after its architecture {self.architecture}")

    def symbol(self, kernel: str) -> str:
        """Name of a kernel in the objects of this variant: each has its own, so that several can be linked together."""
        return f"{kernel}_{self.name.removeprefix(f'{self.architecture}-')}"


_V3 = frozenset({"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"})
_V4_VNNI = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni"}

# By name; of one architecture the best comes first. 512-bit registers are wanted wherever they exist, which the
# compiler's model of x86_64_v4 would avoid.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("x86_64-avx512vnni", "x86_64", "x86_64_v4+avx512vnni-prefer_256_bit", _V4_VNNI),
        Variant("x86_64-avx2", "x86_64", "x86_64_v3", _V3),
        Variant("x86_64-generic", "x86_64", "x86_64"),
        Variant("aarch64-i8mm", "aarch64", "generic+dotprod+i8mm", frozenset({"dotprod", "i8mm"})),
        Variant("aarch64-dotprod", "aarch64", "generic+dotprod", frozenset({"dotprod"})),
        Variant("aarch64-generic", "aarch64", "generic"),
    )
}


def choose_variants(architecture: str, features: Collection[str], *, is_generic: bool) -> list[Variant]:
    """What to link for a processor with these features, the best first; nothing if there is none for its architecture.

    That is the best variant that runs there. If the processor is generic, one that may turn out to have more features,
    all better ones come before it.
    """
    variants = [variant for variant in VARIANTS.values() if variant.architecture == architecture]
    for index, variant in enumerate(variants):
        if variant.features.issubset(features):
            return variants[0 if is_generic else index : index + 1]
    return []


def sources() -> list[Path]:
    """The kernel files, one for each family, in the order of their names."""
    return sorted(SOURCES.glob("*.c"))


def build_objects(directory: Path, variant: Variant) -> list[Path]:
    """Compile every kernel file for one instruction set.

    Returns:
        `<directory>/<variant>/<kernel>.o` for each kernel file.

    Raises:
        KernelBuildError: the compiler fails, or an object refers to something outside of itself.
    """
    folder = directory / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _build_object(folder, variant, source), sources()))


def build_program(target: Path, variant: Variant, inputs: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Link freestanding code and objects into a Linux program without a C library, to be run by tests.

    Raises:
        KernelBuildError: the compiler fails.
    """
    _compile(variant, "linux-none", inputs, target, ("-static", "-nostdlib", *_FREESTANDING_FLAGS, *flags))
    return target


def _build_object(folder: Path, variant: Variant, source: Path) -> Path:
    target = folder / f"{source.stem}.o"
    reserved = _RESERVED.get(variant.architecture, ())
    _compile(variant, "freestanding-none", [source], target, ("-c", "-fPIC", *_FREESTANDING_FLAGS, *reserved))
    missing = undefined_symbols(target)
    if missing:
        raise KernelBuildError(f"{source.name} for {variant.name} needs {', '.join(missing)}: not freestanding")
    _rename_symbols(target, variant.symbol)
    return target


def undefined_symbols(path: Path) -> list[str]:
    """Names that an object expects from elsewhere."""
    elf = _Elf(path.read_bytes())
    return [elf.name(symbol) for symbol in elf.symbols if symbol.section == 0 and symbol.name]


def exported_symbols(path: Path) -> list[str]:
    """Names that an object has for others to link."""
    elf = _Elf(path.read_bytes())
    return [elf.name(symbol) for symbol in elf.symbols if symbol.is_exported]


def _rename_symbols(path: Path, rename: Callable[[str], str]) -> None:
    """Rename what an object exports; a new table of names at the file's end takes the place of the old one."""
    elf = _Elf(path.read_bytes())
    data, names = bytearray(elf.data), bytearray(elf.names)
    for symbol in elf.symbols:
        if symbol.is_exported:
            struct.pack_into("<I", data, symbol.offset, len(names))
            names += rename(elf.name(symbol)).encode() + b"\0"
    struct.pack_into("<QQ", data, elf.names_header + 24, len(data), len(names))
    path.write_bytes(data + names)


class _Elf:
    """The symbols of a 64-bit little-endian ELF object.

    Source of the structs: the System V ABI, chapter 4.
    """

    @dataclass(frozen=True)
    class Symbol:
        """An entry of the symbol table: where it stands, where its name begins, and the section that defines it."""

        offset: int
        name: int
        info: int
        section: int

        @property
        def is_exported(self) -> bool:
            """Whether another object can link it."""
            is_global = self.info >> 4 == 1
            return is_global and self.section != 0

    def __init__(self, data: bytes) -> None:
        self.data = data
        (headers,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, headers + size * index) for index in range(count)]
        symbol_table = 2
        *_, start, length, link, _, _, _ = next(section for section in sections if section[1] == symbol_table)
        self.names_header = headers + size * link
        self.names = data[sections[link][4] :][: sections[link][5]]
        self.symbols = []
        for offset in range(start + 24, start + length, 24):
            name, info, _, section = struct.unpack_from("<IBBH", data, offset)
            self.symbols.append(self.Symbol(offset, name, info, section))

    def name(self, symbol: Symbol) -> str:
        """A symbol's name."""
        return self.names[symbol.name : self.names.index(b"\0", symbol.name)].decode()


def _compile(variant: Variant, system: str, inputs: Sequence[Path], target: Path, flags: Sequence[str]) -> None:
    if importlib.util.find_spec("ziglang") is None:
        raise KernelBuildError("kernels are compiled with the package ziglang, which is not installed")
    command = [
        *(sys.executable, "-m", "ziglang", "cc", "-target", f"{variant.architecture}-{system}", f"-mcpu={variant.cpu}"),
        *_FLAGS,
        *flags,
        *map(str, inputs),
        *("-o", str(target)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise KernelBuildError(f"{' '.join(command)}\nexited with {result.returncode}:\n{result.stderr}")
