"""Draws where the time of a step went as a flame of text: function, layer, kind, dispatch, each below what it is in.

A bar stands below the part of its parent's bar that it fills. Neighbouring layers that run the same dispatches in
about the same time share one branch, or a model of thirty would fill ten screens with the same picture; a layer that
stands out keeps its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich.text import Text

from llmir_iree.tracing.capture import DispatchRun
from llmir_iree.tracing.views.step import TypicalStep
from llmir_iree.tracing.views.words import duration, percent

# A branch below this share of the step is counted, not drawn.
MIN_SHARE = 0.002

# Layers whose times differ by less from their median are drawn as one.
_ALIKE = 0.2

# In a parameter's name, such as the 3 of "blk.3.ffn_down.weight".
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

_PART_BLOCKS = " ▏▎▍▌▋▊▉"
_BLOCK = "█"
_STYLES = ("bold", "cyan", "yellow", "green")
_NAME_SHARE = 0.45
_FIGURES = 18


@dataclass(frozen=True)
class Branch:
    """A part of a step.

    Attributes:
        name: in words.
        ns: time of it, in the whole step.
        children: what it consists of, in the order in which it is drawn; they may not fill it.
    """

    name: str
    ns: int
    children: tuple[Branch, ...] = ()


def build_flame(step: TypicalStep) -> Branch:
    """The step as a tree: function, layer, kind, dispatch."""
    by_layer: defaultdict[int | None, list[DispatchRun]] = defaultdict(list)
    for run in step.runs:
        by_layer[step.site(run).layer].append(run)
    outside = by_layer.pop(None, [])
    layers = [_kinds(step, name, runs) for name, runs in _fold(by_layer)]
    children = [*layers, *([_kinds(step, "outside layers", outside)] if outside else [])]
    between = [Branch("between dispatches", step.between_ns)] if step.between_ns else []
    return Branch(step.function, step.wall_ns, (*children, *between))


def render_flame(root: Branch, width: int, *, is_ascii: bool = False) -> Text:
    """Lines of a flame, coloured by level.

    Args:
        root: as `build_flame` made it.
        width: of a line, in characters.
        is_ascii: draw with characters that any terminal and any file can hold.
    """
    name_width = min(44, max(16, int(width * _NAME_SHARE) - 4))
    bar_width = max(8, width - name_width - _FIGURES - 3)
    text = Text(no_wrap=True, overflow="crop")
    for branch, level, start in _walk(root):
        name = _shorten("  " * level + branch.name, name_width, is_ascii=is_ascii)
        style = _STYLES[min(level, len(_STYLES) - 1)]
        share = branch.ns / root.ns if root.ns else 0.0
        text.append(name.ljust(name_width), "bold" if level == 0 else "")
        time = duration(branch.ns).replace("µ", "u") if is_ascii else duration(branch.ns)
        text.append(f" {time:>10} {percent(share):>6}  ", "dim" if share < 0.01 else "")
        text.append(_bar(start / root.ns if root.ns else 0.0, share, bar_width, is_ascii=is_ascii), style)
        text.append("\n")
    return text


def _walk(root: Branch) -> Iterator[tuple[Branch, int, int]]:
    """Branches large enough to be drawn, with their level and the time at which their bar starts."""
    least = MIN_SHARE * root.ns

    def walk(branch: Branch, level: int, start: int) -> Iterator[tuple[Branch, int, int]]:
        yield branch, level, start
        small: list[Branch] = []
        for child in branch.children:
            if child.ns < least:
                small.append(child)
                continue
            yield from walk(child, level + 1, start)
            start += child.ns
        if small:
            yield Branch(f"{len(small)} smaller", sum(child.ns for child in small)), level + 1, start

    return walk(root, 0, 0)


def _fold(by_layer: dict[int | None, list[DispatchRun]]) -> Iterator[tuple[str, list[DispatchRun]]]:
    """Layers, or runs of layers that are alike, with a name."""
    layers = sorted((layer, runs) for layer, runs in by_layer.items() if layer is not None)
    group: list[tuple[int, list[DispatchRun]]] = []
    for layer, runs in layers:
        if group and not _is_alike(group, layer, runs):
            yield _named(group)
            group = []
        group.append((layer, runs))
    if group:
        yield _named(group)


def _is_alike(group: Sequence[tuple[int, list[DispatchRun]]], layer: int, runs: list[DispatchRun]) -> bool:
    typical = median(_time(other) for _, other in group)
    first, last = group[0][1], group[-1][0]
    is_close = abs(_time(runs) - typical) <= _ALIKE * typical
    return layer == last + 1 and is_close and [run.key for run in first] == [run.key for run in runs]


def _named(group: Sequence[tuple[int, list[DispatchRun]]]) -> tuple[str, list[DispatchRun]]:
    runs = [run for _, own in group for run in own]
    if len(group) == 1:
        return f"layer {group[0][0]}", runs
    return f"layers {group[0][0]}-{group[-1][0]}, {duration(_time(runs) / len(group))} each", runs


def _kinds(step: TypicalStep, name: str, runs: Sequence[DispatchRun]) -> Branch:
    kinds = _grouped(runs, lambda run: step.site(run).kind)
    children = [
        Branch(
            kind.replace("_", " "),
            _time(own),
            _sorted(
                Branch(_dispatch_name(step, same), _time(same))
                for _, same in _grouped(own, lambda run: f"{run.key} {step.site(run).shape}")
            ),
        )
        for kind, own in kinds
    ]
    return Branch(name, _time(runs), _sorted(children))


def _dispatch_name(step: TypicalStep, runs: Sequence[DispatchRun]) -> str:
    """What they read, if that is one weight or the same of several layers, else their export; and the shape."""
    sites = [step.site(run) for run in runs]
    weights = {_LAYER_NUMBER.sub("*", site.weight) if len(sites) > 1 else site.weight for site in sites if site.weight}
    name = runs[0].key.removeprefix(f"{step.function}$async_")
    if len(weights) == 1:
        name = weights.pop()
    name = f"{name} {sites[0].shape or ''}".rstrip()
    return name if len(runs) == 1 else f"{len(runs)} x {name}"


def _grouped(runs: Iterable[DispatchRun], of: Callable[[DispatchRun], str]) -> Iterable[tuple[str, list[DispatchRun]]]:
    groups: defaultdict[str, list[DispatchRun]] = defaultdict(list)
    for run in runs:
        groups[of(run)].append(run)
    return groups.items()


def _sorted(branches: Iterable[Branch]) -> tuple[Branch, ...]:
    return tuple(sorted(branches, key=lambda branch: (-branch.ns, branch.name)))


def _time(runs: Iterable[DispatchRun]) -> int:
    return sum(run.duration_ns for run in runs)


def _shorten(name: str, width: int, *, is_ascii: bool) -> str:
    """The start and the end of a name, that fit: what a dispatch computes stands at the end of its symbol."""
    if is_ascii:
        name = name.encode("ascii", "replace").decode()
    if len(name) <= width:
        return name
    gap = "..." if is_ascii else "…"
    tail = (width - len(gap)) // 2
    return name[: width - len(gap) - tail] + gap + name[-tail:]


def _bar(start: float, share: float, width: int, *, is_ascii: bool) -> str:
    first = min(width - 1, int(start * width))
    if is_ascii:
        return " " * first + "#" * max(1, round(share * width))
    eighths = max(1, round(share * width * 8))
    part = _PART_BLOCKS[eighths % 8].strip()
    return (" " * first + _BLOCK * (eighths // 8) + part)[: width + 1]
