"""Which matrices can be read as one: those that multiply the same input, such as query, key and value.

The archive holds such siblings back to back, plane by plane, and lists one more entry for each plane that spans them
all. So the merged weight is a matrix in the siblings' format, its rows theirs in order, and takes no bytes of its own.
Its name joins theirs: `model.layers.0.mlp.gate_proj+up_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmir_iree.params.layouts import ALIGNMENT, TILE_ROWS, has_tile16

if TYPE_CHECKING:
    from llmir_iree.params.plan import PlannedWeight

# Modules of one parent that share their input, in the order of their rows; the first family that fits is merged.
_FAMILIES = (("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class MergedWeight:
    """Siblings that are read as one weight of this name."""

    name: str
    siblings: tuple[PlannedWeight, ...]

    @property
    def sibling_names(self) -> tuple[str, ...]:
        """Names of the siblings, in the order of their rows."""
        return tuple(weight.spec.name for weight in self.siblings)

    @property
    def spans(self) -> dict[str, tuple[str, ...]]:
        """Archive key of each plane of the merged weight, with the siblings' keys that it spans."""
        planes = [plane.name for plane in self.siblings[0].weight_format.planes]
        return {f"{self.name}.{plane}": tuple(f"{name}.{plane}" for name in self.sibling_names) for plane in planes}


def merged_name(names: Sequence[str]) -> str | None:
    """Name of the weight that these merge into, in this order; None if their names do not make them siblings."""
    parent = _parent(next(iter(names), ""))
    for family in _FAMILIES:
        if tuple(names) == _weight_names(parent, family):
            return _merged_name(parent, family)
    return None


def merge_siblings(plan: Iterable[PlannedWeight]) -> tuple[MergedWeight, ...]:
    """Find the siblings of a plan that the archive merges, in the order of the plan; no weight is in two groups."""
    weights = {weight.spec.name: weight for weight in plan}
    groups = (_group_behind(name, weights) for name in weights)
    return tuple(group for group in groups if group is not None)


def _group_behind(name: str, weights: Mapping[str, PlannedWeight]) -> MergedWeight | None:
    """The siblings of which this weight is the first."""
    parent = _parent(name)
    for family in _FAMILIES:
        names = _weight_names(parent, family)
        if name != names[0] or not all(sibling in weights for sibling in names):
            continue
        siblings = tuple(weights[sibling] for sibling in names)
        if _can_merge(siblings):
            return MergedWeight(_merged_name(parent, family), siblings)
    return None


def _can_merge(siblings: Sequence[PlannedWeight]) -> bool:
    """Whether planes back to back are those of one matrix, and none loses its alignment: the last may end anywhere."""
    first, *_ = siblings
    return (
        has_tile16(first.format)
        and all(weight.spec.kind == "linear" and weight.format == first.format for weight in siblings)
        and all(weight.spec.shape[1] == first.spec.shape[1] for weight in siblings)
        and all(weight.spec.shape[0] % TILE_ROWS == 0 for weight in siblings[:-1])
        and all(nbytes % ALIGNMENT == 0 for weight in siblings[:-1] for nbytes in weight.entry_bytes.values())
    )


def _parent(name: str) -> str:
    """`model.layers.0.mlp.` of `model.layers.0.mlp.up_proj.weight`."""
    return name[: name.rpartition(".")[0].rfind(".") + 1]


def _weight_names(parent: str, family: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{parent}{module}.weight" for module in family)


def _merged_name(parent: str, family: Sequence[str]) -> str:
    return f"{parent}{'+'.join(family)}.weight"
