"""What an implementation has to know of the device that it is compiled for, as iree-compile describes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.compiler_target import describe_target
from llmir_iree.plugins.lowering import Target

FAMILIES = frozenset({"cuda", "rocm", "metal", "vulkan"})

_ARCHITECTURE = re.compile(r'arch = "([^"]+)"')
_SUBGROUP_SIZES = re.compile(r"subgroup_size_choices = \[(\d+)")
_MATRIX_INSTRUCTION = re.compile(r"<(\w+_F32_\w+_(F16|BF16))>")


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        architecture: its name, such as "sm_80", or "" where there is none.
        subgroup: how many lanes run in step.
        matrix_instructions: the compiler's names of those that add up products of 16-bit floats in float32, by the
            element that they multiply, "f16" or "bf16"; the first is the one that it prefers.
    """

    architecture: str
    subgroup: int
    matrix_instructions: dict[str, str]

    @property
    def threads(self) -> int:
        """Of a workgroup that has 4 subgroups, which is what most kernels want."""
        return 4 * self.subgroup


def read_device(target: Target) -> Device:
    """The device that a target's flags name.

    Raises:
        CompileError: iree-compile refuses the flags, or does not describe a GPU.
    """
    description = describe_target(target.flags)
    subgroup = _SUBGROUP_SIZES.search(description)
    if subgroup is None:
        raise CompileError(f"iree-compile does not say which GPU {target.name} is: {' '.join(target.flags)}")
    instructions: dict[str, str] = {}
    for name, element in _MATRIX_INSTRUCTION.findall(description):
        instructions.setdefault(element.lower(), name)
    # iree-compile says of chips before sm_80 that they have its instructions, and then cannot generate them: they came
    # together with those for bfloat16.
    if "bf16" not in instructions and instructions.get("f16", "").startswith("NV_"):
        instructions.clear()
    architecture = _ARCHITECTURE.search(description)
    return Device(architecture[1] if architecture else "", int(subgroup[1]), instructions)
