"""llmir-trace: records runs per dispatch, shows them, compares them, and leads from a dispatch to its IR."""

from __future__ import annotations

from importlib import import_module

import click

# Each stands in a module of its own, imported only when it is called: help has to be instant.
_COMMANDS = {
    "record": ("llmir_iree.cli.trace_record", "Run a bundle or a module and write a capture."),
    "show": ("llmir_iree.cli.trace_show", "Show where the time of a capture went."),
    "diff": ("llmir_iree.cli.trace_diff", "Compare two captures."),
    "ir": ("llmir_iree.cli.trace_ir", "Show what each pass made of a dispatch."),
    "ir-diff": ("llmir_iree.cli.trace_ir_diff", "Find the first pass at which two compilations part."),
    "bench": ("llmir_iree.cli.trace_bench", "Run one dispatch alone, as it was recorded."),
    "overhead": ("llmir_iree.cli.trace_overhead", "Measure what recording adds to a call."),
}


class _LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or None if there is none of this name."""
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(_COMMANDS[cmd_name][0]).main
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write names and lines from the list, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Explain where the time of a compiled model goes, down to the compiler pass."""
