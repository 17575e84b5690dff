"""The targets that a bundle can be compiled for, as one table.

A target is written `family` or `family:chip`, e.g. `llvm-cpu`, `llvm-cpu:znver4`, `cuda:sm_80`, `rocm:gfx942`; `host`
is the CPU of this machine. What the table says of GPUs is what iree-compile 3.13 knows of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmir_iree.params.errors import TargetError


@dataclass(frozen=True)
class Chip:
    """A processor of a family.

    Attributes:
        name: as users write it behind the colon.
        subgroup_size: lanes that run in step, for which kernels are made; None where there are none.
        features: what kernels may count on: "f16-mma", "bf16-mma" and "i8-mma" are instructions that multiply matrices
            of such elements, "i8-dot" is a dot product of four bytes.
        flags: flags for iree-compile that name the chip.
    """

    name: str
    subgroup_size: int | None
    features: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A kind of target: how IREE is told to compile for it, and the HAL driver that runs it.

    `requires` says what the machine needs to have that runs a module. Of a family that is `open`, `chips` are only the
    usual ones, and `chip_flag` takes others. The first chip is the default. With `prefill_chunks` a prompt is prefilled
    in pieces of a fixed size, since matrix instructions want a number of rows that is known.
    """

    name: str
    summary: str
    driver: str
    flags: tuple[str, ...]
    requires: str
    chips: tuple[Chip, ...]
    chip_flag: str | None = None
    is_open: bool = False
    prefill_chunks: bool = True


@dataclass(frozen=True)
class Target:
    """A family and a chip, resolved to what the compiler, the kernels and the bundle need."""

    name: str
    family: str
    chip: str
    driver: str
    flags: tuple[str, ...]
    subgroup_size: int | None
    features: tuple[str, ...]
    requires: str
    prefill_chunks: bool

    @property
    def folder(self) -> str:
        """The target's folder in a bundle."""
        return self.name.replace(":", "-")


_MMA = ("f16-mma", "bf16-mma", "i8-dot")
_MMA_I8 = ("f16-mma", "bf16-mma", "i8-mma", "i8-dot")

# iree-compile 3.13 has no sm_90 behind its flag for chips, but generates code for one that is described in full: that
# of sm_80, with 227 KiB of shared memory and the PTX of CUDA 12.0, the first that knows the chip.
_SM_90 = (
    '--iree-hal-target-device=#hal.device.target<"cuda", [#hal.executable.target<"cuda", "cuda-nvptx-fb", '
    '{iree_codegen.target_info = #iree_gpu.target<arch = "sm_90", features = "+ptx80", wgp = <'
    "compute = fp64|fp32|fp16|int64|int32|int16|int8, storage = b64|b32|b16|b8, subgroup = shuffle|arithmetic, "
    "dot = dp4xi8toi32, mma = [<NV_MMA_SYNC_F32_16x8x16_F16>, <NV_MMA_SYNC_F16_16x8x16_F16>, "
    "<NV_MMA_SYNC_F32_16x8x16_BF16>, <NV_WMMA_F32_16x16x16_F16>, <NV_WMMA_F16_16x16x16_F16>], "
    "subgroup_size_choices = [32], max_workgroup_sizes = [1024, 1024, 1024], max_thread_count_per_workgroup = 1024, "
    "max_workgroup_memory_bytes = 232448, max_workgroup_counts = [2147483647, 65535, 65535]>>}>]>",
)


def _chips(
    names: str, flag: str, subgroup_size: int | None, features: tuple[str, ...] = (), more: tuple[str, ...] = ()
) -> tuple[Chip, ...]:
    """Chips that differ in nothing but their names."""
    return tuple(Chip(name, subgroup_size, features, (f"{flag}={name}", *more)) for name in names.split())


_CPU, _CUDA = "--iree-llvmcpu-target-cpu", "--iree-cuda-target"
_ROCM, _VULKAN = "--iree-rocm-target", "--iree-vulkan-target"
_CUDA_DEVICE = ("--iree-hal-target-device=cuda",)

# The compiler takes the level of SPIR-V from the chip; llvmpipe's says 1.6, of which validators ask more than it gives.
_LAVAPIPE = ("--iree-vulkan-target-features=spirv:v1.3,cap:Shader",)

FAMILIES: tuple[Family, ...] = (
    Family(
        "llvm-cpu",
        "the CPU of this machine, or the one named",
        driver="local-task",
        flags=("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"),
        requires="nothing",
        chips=_chips(
            "host generic x86-64-v3 x86-64-v4 znver2 znver3 znver4 znver5 skylake-avx512 icelake-server sapphirerapids "
            "neoverse-n1 neoverse-n2 neoverse-v1 neoverse-v2 apple-m1 apple-m2 apple-m3 apple-m4",
            _CPU,
            None,
        ),
        chip_flag=_CPU,
        is_open=True,
        prefill_chunks=False,
    ),
    Family(
        "cuda",
        "NVIDIA GPUs, as PTX that newer drivers compile forward",
        driver="cuda",
        flags=(),  # The chips name the device.
        requires="NVIDIA's driver: of CUDA 11.6 for sm_80, 12.0 for sm_90, 12.4 for sm_89, 12.8 for sm_120, or newer",
        chips=(
            *_chips("sm_80 sm_86 sm_87 a100 rtx3070 rtx3080 rtx3090", _CUDA, 32, _MMA, _CUDA_DEVICE),
            *_chips("sm_89 rtx4060 rtx4070 rtx4080 rtx4090", _CUDA, 32, _MMA, _CUDA_DEVICE),
            Chip("sm_90", 32, _MMA, _SM_90),
            *_chips("sm_120 sm_121", _CUDA, 32, _MMA, _CUDA_DEVICE),
            *_chips("sm_75", _CUDA, 32, ("f16-mma", "i8-dot"), _CUDA_DEVICE),
            *_chips("sm_70 sm_72", _CUDA, 32, ("f16-mma",), _CUDA_DEVICE),
            *_chips("sm_60 sm_61 sm_62", _CUDA, 32, (), _CUDA_DEVICE),
        ),
    ),
    Family(
        "rocm",
        "AMD GPUs, as code of exactly the chip that is named",
        driver="hip",
        flags=("--iree-hal-target-device=hip",),
        requires="AMD's HIP runtime, libamdhip64",
        chips=(
            *_chips("gfx942 gfx950 mi300a mi300x mi325x mi350x mi355x gfx90a mi210 mi250 mi250x", _ROCM, 64, _MMA_I8),
            *_chips("gfx908 mi100", _ROCM, 64, ("f16-mma", "i8-mma", "i8-dot")),
            *_chips("gfx1100 gfx1101 gfx1103 gfx1150 gfx1151 rx7900xtx rx7900xt w7900", _ROCM, 32, _MMA_I8),
            *_chips("gfx1200 gfx1201 rx9070 rx9070xt r9700", _ROCM, 32, _MMA_I8),
        ),
    ),
    Family(
        "metal",
        "Apple GPUs; the system compiles the shaders when a module is loaded",
        driver="metal",
        flags=(
            "--iree-hal-target-device=metal",
            "--iree-metal-target-platform=macos",
            "--iree-metal-compile-to-metallib=false",
        ),
        requires="macOS 13 or newer",
        chips=(Chip("", 32, ("i8-dot",), ()),),
    ),
    Family(
        "vulkan",
        "GPUs through Vulkan; llvmpipe is Mesa's implementation on the CPU",
        driver="vulkan",
        flags=("--iree-hal-target-device=vulkan",),
        requires="a driver of Vulkan 1.3 and its loader, libvulkan (Debian: libvulkan1, mesa-vulkan-drivers)",
        chips=(
            *_chips("rdna3 rx7900xtx rx7900xt", _VULKAN, 32, _MMA_I8),
            *_chips("rdna4 rx9070 rx9070xt", _VULKAN, 32, _MMA_I8),
            *_chips("rdna2", _VULKAN, 32, ("i8-dot",)),
            *_chips("rdna1", _VULKAN, 32),
            *_chips("ampere ada a100 rtx3070 rtx3080 rtx3090 rtx4060 rtx4070 rtx4080 rtx4090", _VULKAN, 32, _MMA),
            *_chips("turing", _VULKAN, 32, ("f16-mma", "i8-dot")),
            *_chips("volta", _VULKAN, 32, ("f16-mma",)),
            *_chips("pascal", _VULKAN, 32),
            *_chips("adreno", _VULKAN, 64, ("i8-dot",)),
            *_chips("valhall1 valhall2 valhall3 valhall4 arm5gen", _VULKAN, 16, ("i8-dot",)),
            *_chips("llvmpipe", _VULKAN, 8, ("i8-dot",), _LAVAPIPE),
        ),
    ),
)

HOST = "host"
"""Another name of the first family with its first chip: the CPU of this machine."""

# Weights stay what the archive holds: hoisting their dequantisation into an initialiser, or evaluating it while
# compiling, would give every process a private copy of the whole model.
COMMON_FLAGS = ("--iree-opt-const-expr-hoisting=false", "--iree-opt-const-eval=false", "--iree-opt-level=O3")

_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


def resolve_target(name: str) -> Target:
    """Find the target that a name means.

    Of `llvm-cpu`, any chip may be named; iree-compile says what it thinks of it.

    Raises:
        TargetError: no such family, or a chip that the family does not have.
    """
    if name == HOST:
        name = FAMILIES[0].name
    family_name, colon, chip_name = name.partition(":")
    family = next((family for family in FAMILIES if family.name == family_name), None)
    if family is None:
        known = ", ".join([*(family.name for family in FAMILIES), HOST])
        raise TargetError(f"unknown target {name!r}; known: {known} (a chip may follow, as in cuda:sm_80)")
    chip = _find_chip(family, chip_name) if colon else family.chips[0]
    return Target(
        name=name,
        family=family.name,
        chip=chip.name,
        driver=family.driver,
        flags=(*family.flags, *chip.flags, *COMMON_FLAGS),
        subgroup_size=chip.subgroup_size,
        features=chip.features,
        requires=family.requires,
        prefill_chunks=family.prefill_chunks,
    )


def _find_chip(family: Family, name: str) -> Chip:
    found = next((chip for chip in family.chips if name and chip.name == name), None)
    if found is not None:
        return found
    if family.is_open and _NAME.fullmatch(name):
        return Chip(name, None, (), (f"{family.chip_flag}={name}",))
    known = ", ".join(chip.name for chip in family.chips if chip.name) or "none, write the family alone"
    raise TargetError(f"target '{family.name}:{name}': unknown chip; known for {family.name}: {known}")
