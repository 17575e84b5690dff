"""llmir-compile: compiles an exported bundle for more targets, without exporting again, or a module of MLIR."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.options import compile_options
from llmir_iree.cli.progress import BuildProgress, show_flags

if TYPE_CHECKING:
    from llmir_iree.compile_module import CompiledModule

_MODULE_SUFFIXES = (".mlir", ".mlirbc")


def _list_passes(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from llmir_iree.plugins.pipeline import PIPELINE

    for step in PIPELINE:
        click.echo(f"{step.name:28} {step.summary}")
    ctx.exit()


@click.command(cls=LlmirCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path), required=False, metavar="BUNDLE|MODULE.mlir")
@click.argument("iree_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- IREE_COMPILE_FLAG...]")
@click.option("--list-targets", is_flag=True, help="Show what can be compiled for, and end; with --json as data.")
@click.option("--list-passes", is_flag=True, is_eager=True, expose_value=False, callback=_list_passes)
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the IR after each pass that changed something; llmir-trace ir and ir-diff read it.",
)
@click.option(
    "--emit-spec",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Compile nothing, but write what iree-compile alone needs, and print its command lines.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Of a module: the .vmfb to write."
)
@click.option(
    "--match",
    is_flag=True,
    help="Of a module: also take what torch writes for our ops. These are scaled_dot_product_attention over pages that "
    "a block table gathers from a cache [pages, layers, 2, kv_heads, page_size, head_dim], or from one layer of such, "
    "masked by lengths or positions; and products by 4-bit weights, unpacked from uint8 and scaled in groups of a "
    "multiple of 32 columns. What is not quite that is left alone, and told.",
)
@compile_options
def main(
    bundle: Path | None,
    iree_flags: tuple[str, ...],
    list_targets: bool,
    dump_ir: Path | None,
    emit_spec: Path | None,
    output: Path | None,
    match: bool,
    targets: tuple[str, ...],
    implementations: Any,
    passes: tuple[str, ...],
    verbose: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the portable modules of BUNDLE, or MODULE.mlir, of the torch dialect, with our kernels for our ops.

    Flags after -- go to iree-compile.
    """
    if list_targets:
        from llmir_iree.cli.target_table import show_targets

        show_targets(as_json=as_json)
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE|MODULE.mlir'.")

    from llmir_iree.bundle import Bundle
    from llmir_iree.compile import compile_bundle
    from llmir_iree.params.errors import RequestError
    from llmir_iree.plugins.pipeline import select_passes
    from llmir_iree.targets import resolve_target

    select_passes(passes)
    if not bundle.is_dir() and (bundle.is_file() or bundle.suffix in _MODULE_SUFFIXES or output is not None):
        if output is None:
            raise RequestError(f"{bundle}: a module needs a file to be compiled to; name it with -o")
        if len(targets) > 1 or dump_ir is not None or emit_spec is not None:
            raise RequestError("a module is compiled for one --target; --dump-ir and --emit-spec are for bundles")
        from llmir_iree.compile_module import compile_module

        target = resolve_target(targets[0])
        with BuildProgress(quiet=quiet) as progress:
            progress.reporter().stage(f"compiling for {target.name}")
            module = compile_module(bundle, target, output, iree_flags, implementations, passes, match=match)
        if verbose:
            click.echo(f"{module.target}: iree-compile {' '.join(module.flags)}", err=True)
        _show_module(module, as_json=as_json)
        return
    if output is not None or match:
        raise RequestError(f"{bundle}: --output and --match are for modules, files of MLIR; bundles hold their own")
    if dump_ir is not None and len(targets) > 1:
        raise RequestError("--dump-ir takes the IR of one target: name one with --target")
    resolved = tuple(resolve_target(name) for name in targets)
    opened = Bundle.open(bundle)
    if emit_spec is not None:
        if len(resolved) > 1 or dump_ir is not None:
            raise RequestError("--emit-spec writes for one target, and does not go with --dump-ir")
        import shlex

        from llmir_iree.emit_spec import emit_spec as write_spec

        for command in write_spec(opened, resolved[0], emit_spec, iree_flags, implementations, passes):
            click.echo(shlex.join(command))
        return
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


def _show_module(module: CompiledModule, *, as_json: bool) -> None:
    """Say what stands in for the ops of a module, and what was left alone."""
    if as_json:
        click.echo(json.dumps(asdict(module), indent=2))
        return
    for op, names in module.implementations.items():
        for name, count in names.items():
            click.echo(f"{op}: {count} by {name}")
    for line in module.left_alone:
        click.echo(f"left alone: {line}", err=True)
