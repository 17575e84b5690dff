"""Follows each dispatch of a program through the compiler: what it looked like after each pass that changed it."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llmir_iree.tracing.capture import MANIFEST_NAME, CaptureError
from llmir_iree.tracing.ir_dump import HOW_TO_DUMP, READ_ERRORS, Dump, find_dumps, open_dump, read_log
from llmir_iree.tracing.ir_scopes import Scope, find_exports, find_scopes, own_text, stand_alone
from llmir_iree.tracing.ir_text import (
    count_changes,
    inline_aliases,
    parse_aliases,
    strip_locations,
    strip_prefixes,
    unified_diff,
)

# The level of a pass that runs on a whole program, where "builtin.module" is the module inside an executable.
PROGRAM_LEVEL = "program"

_ENTRY = "function"
_REMEMBERED_DIGESTS = 20000
_NEAREST = 5


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a text stands: bytes of a file, the aliases that it uses, and the parts of it that are not meant."""

    file: Path
    offset: int
    size: int
    indent: int
    aliases: tuple[int, int] = (0, 0)
    holes: tuple[tuple[int, int], ...] = ()

    def read(self) -> str:
        """The text, without indentation and with its aliases replaced.

        Raises:
            CaptureError: the file is gone or shorter than it was.
        """
        try:
            with open_dump(self.file) as stream:
                stream.seek(self.aliases[0])
                head = stream.read(self.aliases[1])
                stream.seek(self.offset)
                data = stream.read(self.size)
        except READ_ERRORS as error:
            raise CaptureError(f"{self.file}: cannot be read: {error}") from None
        if len(data) < self.size or len(head) < self.aliases[1]:
            raise CaptureError(f"{self.file}: has become shorter since it was opened")
        position = self.offset
        pieces = []
        for begin, end in self.holes:
            pieces.append(data[position - self.offset : begin - self.offset])
            position = end
        pieces.append(data[position - self.offset :])
        text = stand_alone(b"".join(pieces), self.indent).decode(errors="replace")
        return inline_aliases(text, parse_aliases(head.decode(errors="replace"))) if head else text


@dataclass(frozen=True)
class IrStep:
    """A pass that changed something.

    Attributes:
        pass_name, options: of the pass, the options with braces.
        level: the op that it ran on, such as "func.func"; "program" for the whole of what is compiled.
        printed: where what was printed stands; of a pass of the whole program, the part that belongs here.
        parts: where each part of the dispatch stands after it, by name, none of them in another.
        before: the same, before it.
        round: how many times the whole program had been printed when it ran, which orders steps of all histories.
    """

    pass_name: str
    options: str
    level: str
    printed: Extent
    parts: Mapping[str, Extent]
    before: Mapping[str, Extent]
    round: int = 0

    @property
    def text(self) -> str:
        """What the pass left, read from the file each time."""
        return self.printed.read()

    @property
    def changed_parts(self) -> tuple[str, ...]:
        """Names of the parts that are not what they were."""
        names = [*self.parts, *(name for name in self.before if name not in self.parts)]
        return tuple(name for name in names if self.parts.get(name) is not self.before.get(name))

    @cached_property
    def lines(self) -> tuple[int, int]:
        """Lines added, and lines removed."""
        return count_changes(self.diff(context=0))

    def diff(self, context: int = 3) -> str:
        """A unified diff of what changed."""
        names = [name for name in self.changed_parts if name != _ENTRY]
        names += [_ENTRY] * (_ENTRY in self.changed_parts)
        before, after = (
            "\n".join(strip_locations(parts[name].read()) for name in names if name in parts)
            for parts in (self.before, self.parts)
        )
        return unified_diff(before, after, context, ("before", f"after {self.pass_name}"))


@dataclass(frozen=True)
class IrHistory:
    """The passes that changed a dispatch, in the order in which they ran.

    Attributes:
        executable: symbol of the executable; empty for the history of a program, without its executables.
        exports: names by which it is called; the last stage's, as profiles know them.
        program: name of the program if there are several, such as "decode", otherwise empty.
        program_history: that of the program around the dispatch, None if this is one.
    """

    executable: str
    exports: tuple[str, ...]
    program: str
    steps: tuple[IrStep, ...]
    program_history: IrHistory | None = None

    @property
    def name(self) -> str:
        """The export, or the executable if it has several; in front of it the program if there are several."""
        own = self.exports[0] if len(self.exports) == 1 else self.executable or "module"
        return f"{self.program}/{own}" if self.program else own

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it answers to."""
        plain = (*self.exports, self.executable)
        return (*plain, *(f"{self.program}/{name}" for name in plain)) if self.program else plain


@dataclass(frozen=True)
class IrDump:
    """All histories that a log or a folder holds."""

    source: Path
    dispatches: tuple[IrHistory, ...]
    programs: tuple[IrHistory, ...]

    @classmethod
    def open(cls, source: Path) -> IrDump:
        """Read a capture, a folder of `--mlir-print-ir-tree-dir` or `llmir-compile --dump-ir`, or a log.

        The text of a step is not kept, it is read again when it is asked for.

        Raises:
            CaptureError: there is nothing there, or no IR in it.
        """
        if source.is_file():
            programs = {"": read_log(source)}
        elif source.is_dir():
            is_capture = (source / MANIFEST_NAME).is_file()
            folder = source / "ir" if is_capture else source
            programs = find_dumps(folder) if folder.is_dir() else {}
            if not programs and is_capture:
                raise CaptureError(f"{source}: was recorded without IR; record it with --with ir")
            if is_capture:  # Of one program, whatever the folder is called that holds it.
                programs = {"": next(iter(programs.values()))}
        else:
            raise CaptureError(f"{source}: no such file or folder")
        histories = [_Program(name).follow(dumps) for name, dumps in programs.items()]
        if not any(history.steps for found in histories for history in found):
            raise CaptureError(f"{source}: holds no IR; {HOW_TO_DUMP}")
        return cls(
            source,
            tuple(history for found in histories for history in found[1:]),
            tuple(found[0] for found in histories),
        )

    def select(self, pattern: str) -> list[IrHistory]:
        """Dispatches of a name, or of a pattern with `*`, or whose name holds it.

        Raises:
            CaptureError: there is none; the message tells the nearest names.
        """
        checks = (
            lambda name: name == pattern,
            lambda name: fnmatch.fnmatchcase(name, pattern),
            lambda name: pattern in name,
        )
        for check in checks:
            if found := [history for history in self.dispatches if any(map(check, history.names))]:
                return found
        names = [name for history in self.dispatches for name in history.names]
        near = difflib.get_close_matches(pattern, names, _NEAREST, 0.3) or names[:_NEAREST]
        listed = ", ".join(dict.fromkeys(near)) or "it has no dispatches"
        raise CaptureError(f"{self.source}: no dispatch matches {pattern!r}; the nearest: {listed}")

    def find(self, pattern: str) -> IrHistory:
        """The only dispatch that `select` finds.

        Raises:
            CaptureError: there is none, or more than one.
        """
        found = self.select(pattern)
        if len(found) > 1:
            names = [history.name for history in found]
            more = f" and {len(names) - _NEAREST} more" if len(names) > _NEAREST else ""
            raise CaptureError(
                f"{self.source}: {pattern!r} matches {len(names)} dispatches: {', '.join(names[:_NEAREST])}{more}"
            )
        return found[0]


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a dump shows of a unit: some of its parts, or all of them, with their digests."""

    pass_name: str
    options: str
    level: str
    printed: Extent
    parts: Mapping[str, tuple[bytes, Extent]]
    is_whole: bool
    round: int


@dataclass
class _Unit:
    """An executable, or all of a program that is in none, as it is while dumps come."""

    name: str
    exports: list[str] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, Extent] = field(default_factory=dict)
    steps: list[IrStep] = field(default_factory=list)
    is_linked: bool = False
    is_merged: bool = False

    def update(self, shown: _Shown) -> None:
        """Enter what a dump says of some of the parts, or of all; it is a step if one of them is new."""
        if self.is_linked:
            return
        kept = {} if shown.is_whole else self.digests
        digests = {**kept, **{name: digest for name, (digest, _) in shown.parts.items()}}
        if digests == self.digests:
            return
        changed = {name: extent for name, (digest, extent) in shown.parts.items() if digest != self.digests.get(name)}
        parts = {name: changed[name] if name in changed else self.parts[name] for name in digests}
        self.steps.append(
            IrStep(shown.pass_name, shown.options, shown.level, shown.printed, parts, self.parts, shown.round)
        )
        self.digests, self.parts = digests, parts


class _Program:
    """Sorts dumps into units."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.own = _Unit("")
        self.units: dict[str, _Unit] = {}
        # The first to have an export or a function keeps it: linked executables repeat those of all others.
        self.unit_of_function: dict[str, _Unit] = {}
        self.round = 0
        self.waiting: list[tuple[str, _Shown]] = []
        self.seen: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()

    def follow(self, dumps: Iterable[Dump]) -> list[IrHistory]:
        """The program's history, and those of its dispatches."""
        for dump in dumps:
            self._enter(dump)
        self._flush()
        program = IrHistory("", (), self.name, tuple(self.own.steps))
        dispatches = (
            IrHistory(unit.name, tuple(unit.exports), self.name, tuple(unit.steps), program)
            for unit in self.units.values()
            if unit.exports and unit.steps and not unit.is_merged
        )
        return [program, *dispatches]

    def _enter(self, dump: Dump) -> None:
        tops = find_scopes(dump.body)
        if not tops:
            return
        top = tops[0]
        unit = self._unit_of(dump, top)
        if unit is not None:
            is_own_function = unit is self.own and top.is_function
            is_whole = top.is_executable or (unit is self.own and not is_own_function)
            shown = self._show(dump, top.op, top, top, unit, b"", is_whole)
            if is_own_function:
                self.waiting.append((top.symbol or "", shown))
                return
            if unit is self.own:
                self._flush()
            unit.update(shown)
        elif top.op == "builtin.module":
            self._enter_program(dump, top)

    def _enter_program(self, dump: Dump, top: Scope) -> None:
        self._flush()
        self.round += 1
        head = dump.body[: top.begin]
        level = dump.anchor or PROGRAM_LEVEL
        if level == "builtin.module" and dump.symbol == top.symbol and dump.executable is None and top.symbol:
            level = PROGRAM_LEVEL
        executables = [scope for scope in top.children if scope.is_executable]
        for scope in executables:
            unit = self._executable(scope.symbol or "")
            is_nested = level not in (PROGRAM_LEVEL, scope.op)
            anchors = [inner for inner in scope.walk() if inner.op == level and dump.symbol in (None, inner.symbol)]
            printed = anchors[0] if is_nested and anchors else scope
            unit_level = PROGRAM_LEVEL if is_nested and not anchors else level
            unit.update(self._show(dump, unit_level, printed, scope, unit, head, is_whole=True))
        if present := {scope.symbol for scope in executables}:
            for unit in self.units.values():
                # Of equal dispatches the compiler keeps one.
                unit.is_merged = unit.is_merged or not (unit.is_linked or unit.name in present)
        self._learn(self.own, top)
        self.own.update(self._show(dump, level, top, top, self.own, head, is_whole=True))

    def _flush(self) -> None:
        """Enter what passes did to the program's functions, which they take side by side, function by function."""
        for _, shown in sorted(self.waiting, key=lambda entry: entry[0]):
            self.own.update(shown)
        self.waiting.clear()

    def _unit_of(self, dump: Dump, top: Scope) -> _Unit | None:
        """Which unit a dump is of; None for a whole program, and for what cannot be told."""
        if top.is_executable:
            return self._executable(top.symbol or "")
        if top.op == "vm.module":
            return self.own
        if dump.executable is not None and dump.anchor is None:
            return self._executable(dump.executable)
        inner = [scope.symbol for scope in top.walk() if scope.is_function and scope.symbol]
        names = [*find_exports(dump.body[top.begin : top.end]), *inner] if not _holds_executables(top) else []
        known = next((self.unit_of_function[name] for name in names if name in self.unit_of_function), None)
        if top.op == "builtin.module":
            # Functions of a whole program are known as well, but it is not entered by its parts.
            return None if known is self.own else known
        if known is None and top.is_function:
            return self.own
        return known

    def _executable(self, symbol: str) -> _Unit:
        if symbol in self.units:
            return self.units[symbol]
        # Folders are named with an underscore for a dot.
        same = (unit for name, unit in self.units.items() if name.replace(".", "_") == symbol.replace(".", "_"))
        return next(same, None) or self.units.setdefault(symbol, _Unit(symbol))

    def _learn(self, unit: _Unit, scope: Scope) -> None:
        """Remember whose the functions are that stand in a scope, outside the executables in it."""
        for child in scope.children:
            if child.is_function and child.symbol:
                self.unit_of_function.setdefault(child.symbol, unit)
            elif not child.is_executable:
                self._learn(unit, child)

    def _show(
        self, dump: Dump, level: str, printed: Scope, top: Scope, unit: _Unit, head: bytes, is_whole: bool
    ) -> _Shown:
        parts = self._parts(dump, top, unit, head)
        return _Shown(dump.pass_name, dump.options, level, _extent(dump, printed, head), parts, is_whole, self.round)

    def _parts(self, dump: Dump, top: Scope, unit: _Unit, head: bytes) -> dict[str, tuple[bytes, Extent]]:
        """The parts that a scope of a dump holds: their digests, and where they stand."""
        if unit is not self.own:
            exports = find_exports(dump.body[top.begin : top.end])
            owners = {name: self.unit_of_function.setdefault(name, unit) for name in exports}
            for owner in owners.values():
                # Where it goes on in an executable with others, it is no longer the dispatch alone that passes change.
                owner.is_linked = owner.is_linked or owner is not unit
            unit.exports = [name for name, owner in owners.items() if owner is unit] or unit.exports
            self._learn(unit, top)
        found: dict[str, tuple[bytes, Extent]] = {}
        stack = [top]
        while stack:
            scope = stack.pop()
            name = _part_name(scope, unit)
            if name in found:  # As in executables with variants for several targets.
                name = f"{name} {len(found)}"
            inner = [child for child in scope.children if not (unit is self.own and child.is_executable)]
            text = own_text(dump.body, scope)
            found[name] = (self._digest(text, head), _extent(dump, scope, head, with_children=False))
            stack.extend(reversed(inner))
        return found

    def _digest(self, text: bytes, head: bytes) -> bytes:
        """The same for texts that differ only in how aliases, locations and types are written."""
        key = (_hash(text), _hash(head) if b"#" in text or b"!" in text else b"")
        if key in self.seen:
            self.seen.move_to_end(key)
            return self.seen[key]
        aliases = parse_aliases(head.decode(errors="replace")) if key[1] else {}
        plain = inline_aliases(text.decode(errors="replace"), aliases)
        digest = _hash(strip_prefixes(strip_locations(plain)).encode())
        self.seen[key] = digest
        if len(self.seen) > _REMEMBERED_DIGESTS:
            self.seen.popitem(last=False)
        return digest


def _part_name(scope: Scope, unit: _Unit) -> str:
    if scope.is_function:
        # The entry is renamed on its way, from a number to what it does.
        return _ENTRY if unit.exports == [scope.symbol] else f"{_ENTRY} @{scope.symbol}"
    if scope.op.endswith(".variant"):
        return f"variant @{scope.symbol}"
    return "executable" if scope.is_executable else "module"


def _holds_executables(scope: Scope) -> bool:
    return any(child.is_executable for child in scope.children)


def _extent(dump: Dump, scope: Scope, head: bytes, with_children: bool = True) -> Extent:
    holes: Iterator[tuple[int, int]] = (
        (dump.offset + child.begin, dump.offset + child.end + 1) for child in ([] if with_children else scope.children)
    )
    return Extent(
        dump.file,
        dump.offset + scope.begin,
        scope.end - scope.begin,
        scope.indent,
        (dump.offset, len(head)) if head else (0, 0),
        tuple(holes),
    )


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()
