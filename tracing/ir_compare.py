"""Finds the first pass at which two histories of a dispatch part for good."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from llmir_iree.tracing.ir_configs import LoweringConfig, describe_changes, find_configs
from llmir_iree.tracing.ir_history import PROGRAM_LEVEL, Extent, IrDump, IrHistory, IrStep
from llmir_iree.tracing.ir_text import count_changes, head_of_diff, normalise, target_attributes, unified_diff

TARGET_LEVEL = "target"

# LLVM, of which MLIR's dumps show nothing, is called by this pass.
_LLVM_PASS = "iree-hal-serialize-target-executables"
_MOST_PASSES = 6


@dataclass(frozen=True)
class Divergence:
    """Where two histories part.

    Attributes:
        pass_name, level: the pass that left something else on one side than on the other, or that only one side ran.
            `level` is "program" where that happened before the dispatch was cut out of its program, and "target" where
            the IR is the same to the end and only the processor differs that LLVM is told.
        hunk: the first lines of a unified diff, from A's text to B's.
        added, removed: lines of the whole diff.
        only_a, only_b: passes that changed something on one side only, over the whole histories.
        configs_a, configs_b: how each side is lowered.
        ran: "both", "a" or "b": which side ran this pass.
        is_input: the two differ before the first pass.
        is_before_dispatch: found in the program around the dispatch, which differs as soon as it exists.
    """

    pass_name: str
    level: str
    hunk: str
    added: int
    removed: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    configs_a: tuple[LoweringConfig, ...]
    configs_b: tuple[LoweringConfig, ...]
    ran: str = "both"
    is_input: bool = False
    is_before_dispatch: bool = False

    def summary(self) -> str:
        """One line."""
        if self.level == TARGET_LEVEL:
            return f"the same IR after every pass; LLVM is told of another processor: {self.hunk.partition(chr(10))[0]}"
        if self.is_input:
            return f"part before the first pass: what iree-compile was given differs, +{self.added} -{self.removed}"
        where = f"first parts at {self.pass_name}"
        if self.is_before_dispatch:
            where = f"differs as soon as it is cut out of its program, which {where}"
        if self.ran != "both":
            where += f", which only {self.ran.upper()} ran"
        return f"{where}: {describe_changes(self.configs_a, self.configs_b) or f'+{self.added} -{self.removed} lines'}"


def compare(a: IrHistory, b: IrHistory) -> Divergence | None:
    """The first pass after which two histories differ and never agree again.

    Passes are aligned by level and name. Values are renumbered, locations dropped and attributes of the target masked.
    If the dispatches differ from their beginning, their programs are compared.

    Returns:
        None if there is no difference, nor in the target.

    Raises:
        CaptureError: a dump is gone.
    """
    found = _compare(a, b)
    if found is None or not found.is_input or a.program_history is None or b.program_history is None:
        return found
    # What made the dispatches different ran before they were cut out; if nothing is to be seen there, look further.
    around = _compare(_until(a.program_history, a.steps[0]), _until(b.program_history, b.steps[0])) or _compare(
        a.program_history, b.program_history
    )
    if around is None or around.level == TARGET_LEVEL:
        return replace(found, is_input=False)
    return replace(around, level=PROGRAM_LEVEL, is_before_dispatch=True)


def compare_programs(a: IrDump, b: IrDump) -> Divergence | None:
    """The first pass that made two programs different, without the insides of their dispatches.

    It tells why a dispatch is on one side only. What was different before dispatches were cut out counts, even if
    nothing but their insides is different from then on.
    """
    others = {history.program: history for history in b.programs}
    if len(a.programs) == len(b.programs) == 1:
        pairs = [(a.programs[0], b.programs[0])]
    else:
        pairs = [(history, others[history.program]) for history in a.programs if history.program in others]
    for ours, theirs in pairs:
        found = _compare(_before_dispatches(a, ours), _before_dispatches(b, theirs))
        if found is None or found.level == TARGET_LEVEL:
            found = _compare(ours, theirs)
        if found is not None:
            return found if found.level == TARGET_LEVEL else replace(found, level=PROGRAM_LEVEL)
    return None


@dataclass(frozen=True)
class Matching:
    """Dispatches of two dumps: those that are the same by name, and those that only one side has."""

    pairs: tuple[tuple[IrHistory, IrHistory], ...]
    only_a: tuple[IrHistory, ...]
    only_b: tuple[IrHistory, ...]


def match_dispatches(a: IrDump, b: IrDump) -> Matching:
    """Match dispatches by the names of their exports, then by those of their executables."""
    rest_a, rest_b = list(a.dispatches), list(b.dispatches)
    pairs: list[tuple[IrHistory, IrHistory]] = []
    for names in (_full_name, _executable_name):
        known = {names(history): history for history in rest_b}
        found = [(history, known[names(history)]) for history in rest_a if names(history) in known]
        pairs += found
        rest_a = [history for history in rest_a if all(history is not ours for ours, _ in found)]
        rest_b = [history for history in rest_b if all(history is not theirs for _, theirs in found)]
    order = {id(history): index for index, history in enumerate(a.dispatches)}
    pairs.sort(key=lambda pair: order[id(pair[0])])
    return Matching(tuple(pairs), tuple(rest_a), tuple(rest_b))


def _full_name(history: IrHistory) -> tuple[str, ...]:
    return (history.program, *history.exports)


def _executable_name(history: IrHistory) -> tuple[str, ...]:
    return (history.program, history.executable)


def _before_dispatches(dump: IrDump, program: IrHistory) -> IrHistory:
    """A program's history until its first dispatch is cut out."""
    firsts = [history.steps[0] for history in dump.dispatches if history.program == program.program]
    return _until(program, min(firsts, key=lambda step: step.round)) if firsts else program


def _until(program: IrHistory, step: IrStep) -> IrHistory:
    """A program's history before a step of one of its dispatches."""
    return replace(program, steps=tuple(other for other in program.steps if other.round < step.round))


def _compare(a: IrHistory, b: IrHistory) -> Divergence | None:
    states = _States()
    keys_a, keys_b = ([(step.level, step.pass_name) for step in history.steps] for history in (a, b))
    opcodes = difflib.SequenceMatcher(a=keys_a, b=keys_b, autojunk=False).get_opcodes()
    pairs = [(i1 + n, j1 + n) for tag, i1, i2, j1, _ in opcodes if tag == "equal" for n in range(i2 - i1)]
    agreed = [pair for pair in pairs if states.agree(a.steps[pair[0]], b.steps[pair[1]])]
    after_a, after_b = agreed[-1] if agreed else (-1, -1)
    rest = next(_events(opcodes, after_a, after_b), None)
    if rest is None:
        return _compare_targets(a, b)
    i, j = rest
    step_a, step_b = (None if i is None else a.steps[i]), (None if j is None else b.steps[j])
    shown = step_b or step_a
    assert shown is not None
    parts_a = step_a.parts if step_a else _parts_after(a, after_a)
    parts_b = step_b.parts if step_b else _parts_after(b, after_b)
    diff = states.diff(parts_a, parts_b)
    added, removed = count_changes(diff)
    return Divergence(
        pass_name=shown.pass_name,
        level=shown.level,
        hunk=head_of_diff(diff),
        added=added,
        removed=removed,
        only_a=tuple(step.pass_name for step in _unmatched(a.steps, opcodes, 1)),
        only_b=tuple(step.pass_name for step in _unmatched(b.steps, opcodes, 3)),
        configs_a=_configs(a, step_a),
        configs_b=_configs(b, step_b),
        ran="both" if step_a and step_b else "a" if step_a else "b",
        is_input=not agreed and (i, j) == (0, 0),
    )


class _States:
    """What parts of dispatches say, each text read once."""

    def __init__(self) -> None:
        self.texts: dict[Extent, str] = {}

    def agree(self, a: IrStep, b: IrStep) -> bool:
        """Whether two dispatches are the same after a pass; never where nothing is left to compare."""
        return (
            any(name.startswith("function") for name in a.parts)
            and a.parts.keys() == b.parts.keys()
            and all(self.text(a.parts[name]) == self.text(b.parts[name]) for name in a.parts)
        )

    def diff(self, a: Mapping[str, Extent], b: Mapping[str, Extent]) -> str:
        """From one state to another, the parts that differ."""
        # Functions last but shown first: they are what the dispatch does.
        names = sorted({*a, *b}, key=lambda name: (not name.startswith("function"), name))
        differing = [
            name for name in names if name not in a or name not in b or self.text(a[name]) != self.text(b[name])
        ]
        before, after = ("\n".join(parts[name].read() for name in differing if name in parts) for parts in (a, b))
        return unified_diff(before, after, names=("a", "b"))

    def text(self, extent: Extent) -> str:
        """Normalised text of a part."""
        if extent not in self.texts:
            self.texts[extent] = normalise(extent.read())
        return self.texts[extent]


_Opcode = tuple[str, int, int, int, int]


def _events(opcodes: Sequence[_Opcode], after_a: int, after_b: int) -> Iterator[tuple[int | None, int | None]]:
    """Steps behind a pair of them, in order: of both sides, or of one, with None for the other."""
    for tag, i1, i2, j1, j2 in opcodes:
        ours = [i for i in range(i1, i2) if i > after_a]
        theirs = [j for j in range(j1, j2) if j > after_b]
        if tag == "equal":
            yield from zip(ours, theirs, strict=True)
        else:
            yield from ((i, None) for i in ours)
            yield from ((None, j) for j in theirs)


def _unmatched(steps: Sequence[IrStep], opcodes: Sequence[_Opcode], column: int) -> Iterator[IrStep]:
    for opcode in opcodes:
        if opcode[0] != "equal":
            begin, end = opcode[column : column + 2]
            yield from steps[int(begin) : int(end)]


def _parts_after(history: IrHistory, index: int) -> Mapping[str, Extent]:
    return history.steps[index].parts if index >= 0 else {}


def _configs(history: IrHistory, step: IrStep | None) -> tuple[LoweringConfig, ...]:
    """How a dispatch is lowered: what stands in it after a pass, or when that was first decided."""
    if not history.executable:
        return ()
    return next((found for other in (*([step] if step else ()), *history.steps) if (found := _configs_of(other))), ())


def _configs_of(step: IrStep) -> tuple[LoweringConfig, ...]:
    text = "\n".join(extent.read() for name, extent in step.parts.items() if name.startswith("function"))
    return find_configs(text)


def _compare_targets(a: IrHistory, b: IrHistory) -> Divergence | None:
    ours, theirs = (
        target_attributes("\n".join(extent.read() for step in history.steps[-1:] for extent in step.before.values()))
        for history in (a, b)
    )
    lines = [
        f"{name}: {_describe(ours.get(name, 'unset'), theirs.get(name, 'unset'))}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if not lines:
        return None
    lines.sort(key=len)  # The processor's name before its features.
    return Divergence(_LLVM_PASS, TARGET_LEVEL, "\n".join(lines), 0, 0, (), (), _configs(a, None), _configs(b, None))


def _describe(ours: str, theirs: str) -> str:
    """One value and another, of a list of features only what differs."""
    if "," not in ours + theirs:
        return f"{ours} -> {theirs}"
    features, others = ours.split(","), theirs.split(",")
    only_ours = ",".join(name for name in features if name not in others)
    only_theirs = ",".join(name for name in others if name not in features)
    return f"{only_ours or 'nothing'} -> {only_theirs or 'nothing'}"
