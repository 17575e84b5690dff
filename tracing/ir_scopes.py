"""Finds the ops that hold others, such as executables and functions, in a module's text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_HEAD = re.compile(
    rb"\n( *)((?:flow|stream|hal)\.executable(?:\.variant|\.source)?|(?:builtin\.)?module|vm\.module"
    rb"|(?:func|util|llvm|vm)\.func)(?= )([^\n]*)\{(?=\n)"
)
_SYMBOL = re.compile(rb'(?: [a-z_]+)*? @(?:"((?:[^"\\]|\\.)*)"|([\w$.-]+))')
_EXPORT = re.compile(rb'\.executable\.export public @(?:"((?:[^"\\]|\\.)*)"|([\w$.-]+))')


@dataclass(slots=True)
class Scope:
    """An op with a body.

    Attributes:
        op: its name, such as "func.func"; "builtin.module" of every module.
        symbol: its name in the module, None if it has none.
        begin, end: its bytes, from the indentation of its first line to the end of its last.
        indent: columns in front of it.
        children: those inside it, in order.
    """

    op: str
    symbol: str | None
    begin: int
    end: int
    indent: int
    children: list[Scope] = field(default_factory=list)

    @property
    def is_executable(self) -> bool:
        """Whether it holds dispatches, at any stage of the compiler."""
        return self.op.endswith((".executable", ".executable.source"))

    @property
    def is_function(self) -> bool:
        """Whether it is a function, of any dialect."""
        return self.op.endswith(".func")

    def walk(self) -> list[Scope]:
        """The scope itself, and all in it."""
        return [self, *(scope for child in self.children for scope in child.walk())]


def find_scopes(text: bytes) -> list[Scope]:
    """The outermost scopes of a text, with those inside them. One whose end is missing is left out."""
    text = b"\n" + text  # So that every line begins with the same byte: it is five times faster to search for.
    tops: list[Scope] = []
    stack: list[Scope] = []
    for match in _HEAD.finditer(text):
        begin = match.start()  # Without the added byte, the first of the line.
        closing = text.find(b"\n" + match[1] + b"}", match.end())
        if closing < 0 and not tops:
            return []  # All that follows stands in it, and would look like outermost scopes.
        if closing < 0:
            continue
        end = text.find(b"\n", closing + 1)
        end = len(text) if end < 0 else end
        op = match[2].decode()
        symbol = _SYMBOL.match(match[3])
        scope = Scope(
            "builtin.module" if op == "module" else op,
            (symbol[1] or symbol[2]).decode() if symbol else None,
            begin,
            end - 1,
            len(match[1]),
        )
        while stack and stack[-1].end <= begin:
            stack.pop()
        (stack[-1].children if stack else tops).append(scope)
        stack.append(scope)
    return tops


def find_exports(text: bytes) -> list[str]:
    """Names by which executables in a text can be called."""
    return [(match[1] or match[2]).decode() for match in _EXPORT.finditer(text)]


def own_text(text: bytes, scope: Scope) -> bytes:
    """A scope's text without that of the scopes in it, as if it stood alone, without indentation."""
    pieces = []
    position = scope.begin
    for child in scope.children:
        pieces.append(text[position : child.begin])
        position = child.end + 1
    pieces.append(text[position : scope.end])
    return stand_alone(b"".join(pieces), scope.indent)


def stand_alone(text: bytes, columns: int) -> bytes:
    """The text of an op as if it were not inside others, which stood so many columns in front of it."""
    if columns:
        spaces = b" " * columns
        text = text.removeprefix(spaces).replace(b"\n" + spaces, b"\n")
    # So is it written inside others only.
    return text.removeprefix(b"builtin.") if text.startswith(b"builtin.module") else text
