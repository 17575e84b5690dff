"""Fills the templates of this folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from jinja2 import Environment, FunctionLoader, StrictUndefined

from llmir_iree.plugins.calls import TensorType

Value = int | float | str | bool | TensorType | tuple[tuple[str, object], ...]


_NAMED: dict[str, Mapping[str, Value]] = {}


def render(template: str, **values: Value) -> str:
    """A template of this folder, filled in.

    Args:
        template: name of the file without `.mlir`.
        values: what the template names.
    """
    return _environment().get_template(f"{template}.mlir").render(values)


def kernel_name(stem: str, **values: Value) -> str:
    """A symbol for a kernel: equal for two exactly if the template and everything that it is filled with are."""
    key = f"{stem} {sorted((name, str(value)) for name, value in values.items())}"
    name = f"llmir_{stem}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    _NAMED[name] = MappingProxyType({**values, "stem": stem})
    return name


def named_kernels() -> dict[str, Mapping[str, Value]]:
    """What stands behind every name that this process gave: the stem, and what its template is filled with."""
    return dict(_NAMED)


@cache
def _environment() -> Environment:
    # MLIR has braces and percent signs of its own.
    environment = Environment(
        loader=FunctionLoader(lambda name: (files(__package__) / name).read_text(encoding="utf-8")),
        line_statement_prefix="%%",
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.globals["sizes"] = _sizes
    environment.globals["sized"] = lambda tensor, *names: f"{tensor}{_sizes(tensor, *names)}"
    return environment


def _sizes(tensor: TensorType, *names: str) -> str:
    """The braces behind a tensor type, where one of its dimensions is dynamic."""
    return f"{{{', '.join(names)}}}" if None in tensor.shape else ""
