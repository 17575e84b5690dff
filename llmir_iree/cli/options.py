"""Options that llmir-export and llmir-compile share: what to compile for and how, and what to print."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from llmir_iree.plugins.lowering import Preference

Command = TypeVar("Command", bound=Callable[..., None])


class NameList(click.ParamType[tuple[str, ...]]):
    """Names, separated by commas."""

    name = "NAME,NAME,..."

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> tuple[str, ...]:
        """Parse the list; an empty one has no names."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(",") if part.strip())


_COMPILE_OPTIONS = (
    click.option(
        "--target", "targets", multiple=True, default=("llvm-cpu",), help="Target to compile for; repeatable."
    ),
    click.option(
        "--implementations",
        type=click.Choice(get_args(Preference)),
        default="best",
        help="What stands in for the model's ops: the fastest (8-bit activations on CPUs, 16-bit ones where a GPU "
        "multiplies matrices), kernels of our own alone, what GPU compilers make of forms before kernels, or what runs "
        "anywhere.",
    ),
    click.option(
        "--passes",
        type=NameList(),
        default="",
        show_default="all",
        metavar="LIST",
        help="Passes of the plugin to run, or, with a minus in front of each, not to run; --list-passes names them.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Print the flags given to iree-compile."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option("--json", "as_json", is_flag=True, help="Print the manifest, or what became of a module, to stdout."),
)


def compile_options(command: Command) -> Command:
    """Add `targets`, `implementations`, `passes`, `verbose`, `quiet` and `as_json` to a command."""
    for option in reversed(_COMPILE_OPTIONS):
        command = option(command)
    return command
