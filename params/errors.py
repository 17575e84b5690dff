"""The exceptions that a user's mistake raises; the command lines turn each into one line and exit code 2.

LlmirError
├── SourceError        a checkpoint that cannot be found, read or believed
│   └── ParameterError   a tensor that is missing or does not have the shape its model needs
├── BundleError        a bundle that is damaged, of another version, or not the one that a module belongs to
├── TargetError        an unknown target, or one that this machine cannot build or run
├── CompileError       iree-compile failed; carries the command and its stderr
└── RequestError       a prompt or an option that cannot be served
"""

_MAX_MESSAGE = 1000


class LlmirError(Exception):
    """Base of the errors that a user can mend; the message says what was wrong and what would be valid."""


class SourceError(LlmirError):
    """A checkpoint that cannot be found, read or believed; always one printable line."""

    def __init__(self, message: str) -> None:
        # Messages quote names out of damaged or hostile files: those may hold line breaks, escape sequences, megabytes.
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message[:_MAX_MESSAGE])
        super().__init__(line + ("..." if len(message) > _MAX_MESSAGE else ""))


class ParameterError(SourceError):
    """A tensor that is missing from a checkpoint or does not have the shape its model needs."""


class BundleError(LlmirError):
    """A bundle that is damaged, of another version, or not the one that a module belongs to."""


class TargetError(LlmirError):
    """An unknown target, or one that this machine cannot build or run."""


class CompileError(LlmirError):
    """The compiler failed; the message carries the command, its exit code and its stderr."""


class RequestError(LlmirError):
    """A prompt or an option that cannot be served."""
