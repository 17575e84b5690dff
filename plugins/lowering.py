"""One lowering: what a module is lowered for, and what was chosen on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from llmir_iree.params.errors import CompileError

Preference = Literal["best", "kernels", "formulations", "portable"]
"""Which implementations the seam may choose: the fastest that serve, only those that do not count on how well the
compiler does, those that do before all others, or only those that run everywhere.

The portable ones are exact but for the order of sums, and so are GPU kernels. The CPU's kernels of matmuls round
activations to 8 bits, and matrix instructions of GPUs activations and weights to float16.
"""


class Target(Protocol):
    """What a module is compiled for; `llmir_iree.targets.Target` is one."""

    @property
    def name(self) -> str:
        """As a user writes it."""

    @property
    def family(self) -> str:
        """The kind of target, e.g. "llvm-cpu"."""

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags that iree-compile will be given."""


@dataclass
class Lowering:
    """The target and the preference that passes decide by.

    `merged` are the weights of the archive that span others, with the names of those in order. `implementations` fills
    as ops are lowered: of every op, how many calls each implementation stands in for. `left_alone` tells, a line each,
    of what a pass was meant to match and did not.
    """

    target: Target
    preference: Preference = "best"
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    implementations: dict[str, Counter[str]] = field(default_factory=dict)

    left_alone: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.preference not in get_args(Preference):
            known = ", ".join(get_args(Preference))
            raise CompileError(f"unknown implementations {self.preference!r}; known: {known}")

    def record(self, op: str, implementation: str) -> None:
        """Count a call that an implementation stands in for."""
        self.implementations.setdefault(op, Counter())[implementation] += 1

    def leave(self, line: str) -> None:
        """Note what a pass leaves alone, and why."""
        self.left_alone.append(line)
