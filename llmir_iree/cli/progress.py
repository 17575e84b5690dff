"""Progress of a build on stderr: the stages with their times, and a bar while parameters are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from llmir_iree.build import Reporter
    from llmir_iree.bundle import TargetInfo


class BuildProgress:
    """Shows what a build reports; nothing if quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._stage: str | None = None
        self._since = 0.0
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close_bar()
        if kind is None:
            self._end_stage()

    def reporter(self) -> Reporter:
        """The callbacks to hand to `build_bundle`."""
        from llmir_iree.build import Reporter

        if self.quiet:
            return Reporter()
        return Reporter(self._start_stage, self._note, self._start_parameters)

    def _start_stage(self, text: str) -> None:
        self._close_bar()
        self._end_stage()
        self._stage, self._since = text, time.monotonic()
        click.echo(f"{text} ...", err=True)

    def _end_stage(self) -> None:
        if self._stage is not None:
            click.echo(f"  {time.monotonic() - self._since:.1f} s", err=True)
            self._stage = None

    def _note(self, text: str) -> None:
        click.echo(f"  {text}", err=True)

    def _start_parameters(self, tensors: int, nbytes: int) -> Callable[[str, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("  {task.fields[tensors]}/{task.fields[of]} tensors"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        bar = self._progress.add_task("parameters", total=nbytes, tensors=0, of=tensors)
        seen: set[str] = set()

        def advance(name: str, written: int) -> None:
            seen.add(name)
            if self._progress is not None:
                self._progress.update(bar, advance=written, tensors=len(seen))

        return advance

    def _close_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def show_flags(targets: Iterable[TargetInfo]) -> None:
    """Print, to stderr, the flags that each module was compiled with."""
    for target in targets:
        for phase, module in target.modules.items():
            click.echo(f"{target.target} {phase}: iree-compile {' '.join(module.flags)}", err=True)
