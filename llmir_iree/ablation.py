"""What each pass of the plugin gives: times a bundle compiled without it, in turn with one that has them all.

    python -m llmir_iree.ablation BUNDLE

The table on stdout is Markdown. Ratios are of tokens a second, without the pass to with all of them; the two take turns
in every repetition, so that what disturbs one disturbs both.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import click

from llmir_iree.bench import time_tokens
from llmir_iree.bench_cases import Case
from llmir_iree.bench_engines import BundleEngine
from llmir_iree.bench_validation import random_tokens
from llmir_iree.bundle import PARAMETERS_NAME, Bundle
from llmir_iree.cli.common import LlmirCommand
from llmir_iree.compile import compile_bundle
from llmir_iree.plugins.pipeline import PIPELINE
from llmir_iree.targets import resolve_target

CASES = (Case("pp", 128, 1), Case("tg", 32, 1))
_LENGTH = max(case.length for case in CASES)


@click.command("llmir-ablation", cls=LlmirCommand)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each test.")
def main(bundle: Path, repetitions: int) -> None:
    """Time BUNDLE with all passes but one, for each pass that may be left out."""
    source = Bundle.open(bundle)
    click.echo(f"| left out | {' | '.join(case.test for case in CASES)} |")
    click.echo(f"|---|{'---:|' * len(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        full = _compile(source, Path(folder) / "all", ())
        for step in PIPELINE:
            if not (step.required or step.on_request):
                without = _compile(source, Path(folder) / step.name, (f"-{step.name}",))
                ratios = (_ratio(case, without, full, repetitions) for case in CASES)
                click.echo(f"| {step.name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


def _compile(source: Bundle, folder: Path, passes: tuple[str, ...]) -> BundleEngine:
    """A copy of a bundle that shares its archive, compiled for this machine with some passes."""
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns(PARAMETERS_NAME, "*.vmfb"))
    (folder / PARAMETERS_NAME).symlink_to(source.path(PARAMETERS_NAME).resolve())
    bundle = Bundle.open(folder)
    target = resolve_target("llvm-cpu")
    compile_bundle(bundle, target, passes=passes)
    return BundleEngine(bundle, target.name, None, [(1, _LENGTH)])


def _ratio(case: Case, without: BundleEngine, full: BundleEngine, repetitions: int) -> float:
    """Tokens a second without a pass by those with it, the median over repetitions after one that warms up."""
    ratios = []
    for repetition in range(repetitions + 1):
        tokens = random_tokens(full.vocab_size, case.batch, case.new_tokens, repetition)
        ratios.append(time_tokens(full, case, tokens, _LENGTH) / time_tokens(without, case, tokens, _LENGTH))
    return statistics.median(ratios[1:])


if __name__ == "__main__":
    main()
