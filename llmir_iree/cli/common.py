"""What all command lines share: how they end when something goes wrong."""

from __future__ import annotations

import errno
import os
from typing import Any

import click

from llmir_iree.params.errors import LlmirError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "LLMIR_DEBUG"

# Of the system's errors, those that a user can mend: space, quota and permissions.
_MENDABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})


class LlmirCommand(click.Command):
    """A command that ends in one line on stderr, not in a traceback, when the user has something to mend.

    Exit codes: 2 for an error of the user's (click uses the same for a wrong option), 130 after Ctrl-C. With
    LLMIR_DEBUG=1 in the environment the traceback comes instead of the line.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)  # Ends the line that was being written.
            ctx.exit(EXIT_INTERRUPTED)
        except (LlmirError, OSError) as error:
            is_mendable = isinstance(error, LlmirError) or error.errno in _MENDABLE
            if not is_mendable or os.environ.get(DEBUG_VARIABLE) == "1":
                raise
            show_error(ctx, error)
            ctx.exit(EXIT_ERROR)


def show_error(ctx: click.Context, error: Exception) -> None:
    """Write an error to stderr as one line, whatever its message looks like."""
    message = " ".join(str(error).split())
    click.echo(f"{ctx.find_root().info_name}: error: {message}", err=True)
