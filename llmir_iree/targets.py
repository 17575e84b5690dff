"""The targets that a bundle can be compiled for, as one table.

A target is written `family` or `family:chip`, e.g. `llvm-cpu`, `llvm-cpu:znver4`, `cuda:sm_80`, `rocm:gfx942`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmir_iree.params.errors import TargetError


@dataclass(frozen=True)
class Family:
    """A kind of target: how IREE is told to compile for it, and the HAL driver that runs it."""

    name: str
    summary: str
    driver: str
    flags: tuple[str, ...]
    chip_flag: str | None = None
    default_chip: str | None = None


@dataclass(frozen=True)
class Target:
    """A family and a chip, resolved to what the compiler and the bundle need."""

    name: str
    family: str
    driver: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The target's folder in a bundle."""
        return self.name.replace(":", "-")


FAMILIES: tuple[Family, ...] = (
    Family(
        "llvm-cpu",
        "the CPU of this machine, or the one named",
        driver="local-task",
        flags=("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"),
        chip_flag="--iree-llvmcpu-target-cpu",
        default_chip="host",
    ),
    Family(
        "cuda",
        "NVIDIA GPUs, as PTX that newer drivers compile forward",
        driver="cuda",
        flags=("--iree-hal-target-device=cuda",),
        chip_flag="--iree-cuda-target",
        default_chip="sm_80",
    ),
    Family(
        "rocm",
        "AMD GPUs",
        driver="hip",
        flags=("--iree-hal-target-device=hip",),
        chip_flag="--iree-rocm-target",
        default_chip="gfx942",
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
    ),
    Family(
        "vulkan",
        "GPUs through Vulkan",
        driver="vulkan",
        flags=("--iree-hal-target-device=vulkan",),
        chip_flag="--iree-vulkan-target",
        default_chip="rdna3",
    ),
)

# Weights stay what the archive holds: hoisting their dequantisation into an initialiser, or evaluating it while
# compiling, would give every process a private copy of the whole model.
COMMON_FLAGS = ("--iree-opt-const-expr-hoisting=false", "--iree-opt-const-eval=false", "--iree-opt-level=O3")

_CHIP = re.compile(r"[A-Za-z0-9_.+-]+")


def resolve_target(name: str) -> Target:
    """Find the target that a name means.

    Raises:
        TargetError: no such family, or a chip where the family has none.
    """
    family_name, colon, chip = name.partition(":")
    family = next((family for family in FAMILIES if family.name == family_name), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise TargetError(f"unknown target {name!r}; known: {known} (a chip may follow, as in cuda:sm_80)")
    if colon and (family.chip_flag is None or not _CHIP.fullmatch(chip)):
        raise TargetError(f"target {name!r}: {family.name} takes no chip of that name")
    chosen = chip or family.default_chip
    chip_flags = (f"{family.chip_flag}={chosen}",) if family.chip_flag else ()
    return Target(name, family.name, family.driver, (*family.flags, *chip_flags, *COMMON_FLAGS))
