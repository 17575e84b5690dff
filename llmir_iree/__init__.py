"""Turns a Llama-family checkpoint into compiled IREE modules, runs them, and explains where the time goes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmir_iree.generate import LLM, Completion, Token, Usage
    from llmir_iree.sampling import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams", "Token", "Usage"]

_HOMES = {
    "LLM": "llmir_iree.generate",
    "Completion": "llmir_iree.generate",
    "SamplingParams": "llmir_iree.sampling",
    "Token": "llmir_iree.generate",
    "Usage": "llmir_iree.generate",
}


def __getattr__(name: str) -> object:
    """Import on first use: the runtime and its libraries are heavy, and the command lines' `--help` needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
