"""Matches the dispatches of two captures: which place in the one function is which place in the other.

Between two compilations of one model ordinals shift, exports are renamed and dispatches fuse or fall apart, but what
stays keeps its order. The places of a function are therefore aligned as two sequences, so that the likenesses of the
pairs add up to the most: the same call site with the same export counts more than the same op and shape, and that
more than the same source line. What finds no partner is kept, as only in A or only in B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmir_iree.tracing.capture import DispatchRun, Site

Basis = Literal["export", "operation", "line"]

# One place of a better basis outweighs one of a worse basis, and two of the next below.
_SCORES: dict[Basis, int] = {"export": 8, "operation": 3, "line": 1}

# The ordinal in an executable's symbol counts what stands before it, so that it says nothing of the dispatch itself.
_ORDINAL = re.compile(r"(_dispatch)_\d+")


@dataclass(frozen=True)
class Place:
    """A place in a function that dispatched in the processes of a capture.

    Attributes:
        function, site, key: as in `DispatchRun`.
        workgroups: of its first run.
        facts: what the IR tells of it, None where the capture has no such row.
    """

    function: str
    site: int
    key: str
    workgroups: tuple[int, int, int]
    facts: Site | None = None


@dataclass(frozen=True)
class Match:
    """A place of A, the same place of B, and what they were recognised by; one side is None for what has no partner."""

    a: Place | None
    b: Place | None
    basis: Basis | None

    @property
    def function(self) -> str:
        """The function that it is in."""
        place = self.a or self.b
        assert place is not None
        return place.function


def find_places(runs: Sequence[DispatchRun], sites: Sequence[Site]) -> list[Place]:
    """Places of all functions that ran, in the order of functions and of sites.

    A site that dispatched different exports in different calls is a place for each of them.
    """
    facts = {(site.function, site.site, site.key): site for site in sites}
    workgroups: dict[tuple[str, int, str], tuple[int, int, int]] = {}
    for run in runs:
        workgroups.setdefault((run.function, run.site, run.key), run.workgroups)
    return [Place(*place, workgroups[place], facts.get(place)) for place in sorted(workgroups)]


def match_places(a: Sequence[Place], b: Sequence[Place]) -> list[Match]:
    """Match places function by function.

    Args:
        a: places as `find_places` lists them. Without facts they are matched by keys and order alone.
        b: those of the other side.

    Returns:
        Every place of both sides in exactly one match, in the order of both sides.
    """
    matches: list[Match] = []
    for function in sorted({place.function for place in (*a, *b)}):
        matches += _align(
            [place for place in a if place.function == function], [place for place in b if place.function == function]
        )
    return matches


def find_basis(a: Place, b: Place) -> Basis | None:
    """What two places of one function have in common, None if they cannot be the same."""
    x, y = a.facts, b.facts
    is_same_export = _without_ordinal(a.key) == _without_ordinal(b.key)
    if x is None or y is None:
        return "export" if is_same_export else None
    if _differ(x.layer, y.layer) or _differ(x.weight, y.weight):
        return None
    if is_same_export:
        return "export"
    if (x.kind, x.shape, x.op) == (y.kind, y.shape, y.op) and (x.shape or x.op):
        return "operation"
    # The weight stays when the kernel that reads it, and with it the kind and the shape, is another.
    if x.weight is not None and x.weight == y.weight:
        return "operation"
    return "line" if x.line is not None and x.line == y.line and x.op == y.op else None


@cache
def _without_ordinal(key: str) -> str:
    return _ORDINAL.sub(r"\1", key)


def _differ(x: object, y: object) -> bool:
    return x is not None and y is not None and x != y


def _align(a: list[Place], b: list[Place]) -> list[Match]:
    """The alignment of the highest score, found from its end: `best[i, j]` is the score of `a[i:]` with `b[j:]`."""
    bases = [[find_basis(x, y) for y in b] for x in a]
    best = _best_scores([[_SCORES[basis] if basis else 0 for basis in row] for row in bases], len(a), len(b))
    matches = []
    i = j = 0
    while i < len(a) and j < len(b):
        basis = bases[i][j]
        if basis and best[i, j] == _SCORES[basis] + best[i + 1, j + 1]:
            matches.append(Match(a[i], b[j], basis))
            i, j = i + 1, j + 1
        elif best[i, j] == best[i + 1, j]:
            matches.append(Match(a[i], None, None))
            i += 1
        else:
            matches.append(Match(None, b[j], None))
            j += 1
    return matches + [Match(place, None, None) for place in a[i:]] + [Match(None, place, None) for place in b[j:]]


def _best_scores(scores: list[list[int]], rows: int, columns: int) -> npt.NDArray[np.int64]:
    best = np.zeros((rows + 1, columns + 1), np.int64)
    for i in reversed(range(rows)):
        # Without the pair or with it; then what a place of B further right would give.
        here = np.maximum(best[i + 1, :-1], best[i + 1, 1:] + np.array(scores[i], np.int64))
        best[i, :-1] = np.maximum.accumulate(here[::-1])[::-1]
    return best
