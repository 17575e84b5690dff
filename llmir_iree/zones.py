"""Zones of our own in a Tracy capture, beside those of IREE's runtime.

IREE's instrumented runtime (IREE_PY_RUNTIME=tracy) carries a Tracy client and exports its C interface; what is emitted
here goes through that client, so that one capture shows both. With any other runtime nothing happens, in less than a
microsecond.

>>> with zone("prefill"):
...     session.prefill(rows)
>>> frame_mark("token")
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import TracebackType

_NOTHING = nullcontext()


def zone(name: str, text: str = "") -> AbstractContextManager[None]:
    """Something for a `with` statement: all that happens inside is one zone, at the caller's place in the source.

    Zones have to end in the thread in which they began, the last one first, or recording hangs: there may be no `yield`
    inside.

    Args:
        name: what it is called; one of few, as the client keeps every one.
        text: what sets this one apart from others of its name.
    """
    client = _client()
    return _NOTHING if client is None else _Zone(client, name, text)


def frame_mark(name: str) -> None:
    """End a frame of the set `name`, such as one frame for every token; the next one begins here."""
    client = _client()
    if client is not None:
        client.frame_mark(name)


def message(text: str) -> None:
    """Leave a text at this time."""
    client = _client()
    if client is not None:
        client.message(text)


def is_tracing() -> bool:
    """Whether zones go anywhere: whether the runtime of this process is the instrumented one."""
    return _client() is not None


class _Context(ctypes.Structure):
    """A zone that has begun."""

    _fields_ = (("id", ctypes.c_uint32), ("active", ctypes.c_int32))


class _Client:
    """The functions that the runtime exports."""

    def __init__(self, library: ctypes.CDLL) -> None:
        text = (ctypes.c_char_p, ctypes.c_size_t)
        # Line, file, function, name and colour; the client frees it when the zone has been sent.
        self._location = library["___tracy_alloc_srcloc_name"]
        self._location.argtypes = (ctypes.c_uint32, *text, *text, *text, ctypes.c_uint32)
        self._location.restype = ctypes.c_uint64
        self._begin = library["___tracy_emit_zone_begin_alloc"]
        self._begin.argtypes = (ctypes.c_uint64, ctypes.c_int32)
        self._begin.restype = _Context
        self._text = library["___tracy_emit_zone_text"]
        self._text.argtypes = (_Context, *text)
        self._text.restype = None
        self._end = library["___tracy_emit_zone_end"]
        self._end.argtypes = (_Context,)
        self._end.restype = None
        self._frame_mark = library["___tracy_emit_frame_mark"]
        self._frame_mark.argtypes = (ctypes.c_void_p,)
        self._frame_mark.restype = None
        self._message = library["___tracy_emit_message"]
        self._message.argtypes = (*text, ctypes.c_int32)
        self._message.restype = None
        self._frame_names: dict[str, int] = {}

    def begin(self, name: str, text: str, line: int, file: str, function: str) -> _Context:
        """Begin a zone."""
        strings = [value.encode() for value in (file, function, name)]
        location = self._location(line, *(part for value in strings for part in (value, len(value))), 0)
        context: _Context = self._begin(location, 1)
        if text:
            note = text.encode()
            self._text(context, note, len(note))
        return context

    def end(self, context: _Context) -> None:
        """End it."""
        self._end(context)

    def frame_mark(self, name: str) -> None:
        """End a frame."""
        if name not in self._frame_names:
            buffer = ctypes.create_string_buffer(name.encode())
            # The client keeps the address and reads there after the interpreter has ended: never to be freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(buffer))
            self._frame_names[name] = ctypes.addressof(buffer)
        self._frame_mark(self._frame_names[name])

    def message(self, text: str) -> None:
        """Leave a text."""
        note = text.encode()
        self._message(note, len(note), 0)


class _Zone:
    """A zone for a `with` statement."""

    __slots__ = ("_client", "_context", "_name", "_text")

    def __init__(self, client: _Client, name: str, text: str) -> None:
        self._client = client
        self._name = name
        self._text = text

    def __enter__(self) -> None:
        frame = sys._getframe(1)
        code = frame.f_code
        self._context = self._client.begin(self._name, self._text, frame.f_lineno, code.co_filename, code.co_qualname)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.end(self._context)


@lru_cache(maxsize=1)
def _client() -> _Client | None:
    """The client, None if the runtime is not the instrumented one: that is settled when it is first imported."""
    from iree._runtime import libs

    if libs.name != "tracy":
        return None
    from iree._runtime.libs import _runtime

    return _Client(ctypes.CDLL(_runtime.__file__))
