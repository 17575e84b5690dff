"""llmir-compile: compiles an exported bundle for more targets, without exporting again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.options import compile_options
from llmir_iree.cli.progress import BuildProgress, show_flags


def _list_targets(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from llmir_iree.targets import FAMILIES

    for family in FAMILIES:
        chip = f":{family.default_chip}" if family.default_chip else ""
        click.echo(f"{family.name + chip:16} {family.driver:12} {family.summary}")
    ctx.exit()


def _list_passes(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from llmir_iree.plugins.pipeline import PIPELINE

    for step in PIPELINE:
        click.echo(f"{step.name:28} {step.summary}")
    ctx.exit()


@click.command(cls=LlmirCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("iree_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- IREE_COMPILE_FLAG...]")
@click.option("--list-targets", is_flag=True, is_eager=True, expose_value=False, callback=_list_targets)
@click.option("--list-passes", is_flag=True, is_eager=True, expose_value=False, callback=_list_passes)
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the IR after each pass that changed something; llmir-trace ir and ir-diff read it.",
)
@compile_options
def main(
    bundle: Path,
    iree_flags: tuple[str, ...],
    dump_ir: Path | None,
    targets: tuple[str, ...],
    implementations: Any,
    passes: tuple[str, ...],
    verbose: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the portable modules of BUNDLE; flags after -- go to iree-compile."""
    from llmir_iree.bundle import Bundle
    from llmir_iree.compile import compile_bundle
    from llmir_iree.params.errors import RequestError
    from llmir_iree.plugins.pipeline import select_passes
    from llmir_iree.targets import resolve_target

    select_passes(passes)
    if dump_ir is not None and len(targets) > 1:
        raise RequestError("--dump-ir takes the IR of one target: name one with --target")
    resolved = tuple(resolve_target(name) for name in targets)
    opened = Bundle.open(bundle)
    compiled = []
    with BuildProgress(quiet=quiet) as progress:
        report = progress.reporter()
        for target in resolved:
            report.stage(f"compiling for {target.name}")
            compiled.append(compile_bundle(opened, target, iree_flags, implementations, passes, dump_ir))
    if verbose:
        show_flags(compiled)
    if as_json:
        click.echo(opened.manifest.model_dump_json(indent=2))
