"""Checks a bundle on a CUDA GPU: every op, then a whole text, then its speed beside PyTorch on the same card.

python -m llmir_iree.check_gpu BUNDLE CHECKPOINT
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from llmir_iree.cli.common import EXIT_ERROR, LlmirCommand

TARGET = "cuda:sm_80"
"""As every card since then runs it."""

PROMPT = "The capital of France is"
TOKENS = 32
PREFILL_TOKENS = 512
DECODE_TOKENS = 64
REPETITIONS = 5


def find_gpu() -> str | None:
    """Name of the first CUDA GPU, or None."""
    import iree.runtime as rt

    if "cuda" not in rt.query_available_drivers():
        return None
    try:
        devices = rt.get_driver("cuda").query_available_devices()
    except RuntimeError:
        return None
    return str(devices[0]["name"]) if devices else None


def copy_for_gpu(bundle_path: Path, folder: Path) -> Path:
    """A bundle in another folder that shares all files but has modules for the GPU and the CPU, compiled here.

    Raises:
        CompileError: they do not compile.
    """
    from llmir_iree.bundle import MANIFEST_NAME, TOKENIZER_FOLDER, Bundle
    from llmir_iree.compile import compile_bundle
    from llmir_iree.targets import resolve_target

    source = Bundle.open(bundle_path)
    names = [info.file for info in source.manifest.portable.values()]
    for name in [*names, source.manifest.parameters.file, TOKENIZER_FOLDER]:
        (folder / name).symlink_to(source.path(name).resolve())
    (folder / MANIFEST_NAME).write_text(
        source.manifest.model_copy(update={"targets": {}}).model_dump_json(), encoding="utf-8"
    )
    bundle = Bundle.open(folder)
    for name in ("llvm-cpu", TARGET):
        compile_bundle(bundle, resolve_target(name))
    return folder


def compare_texts(bundle: Path) -> tuple[list[int], list[int]]:
    """The likeliest tokens after a prompt, on the CPU and on the GPU."""
    from llmir_iree.generate import LLM
    from llmir_iree.sampling import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    cpu, gpu = (
        list(LLM(bundle, target, max_seq_len=256).generate(PROMPT, params).tokens) for target in ("llvm-cpu", TARGET)
    )
    return cpu, gpu


def time_ours(bundle: Path) -> tuple[float, float]:
    """Tokens a second of a prefill and of a decode behind it, the best of several."""
    from llmir_iree.bundle import Bundle
    from llmir_iree.pages import Sequence
    from llmir_iree.session import Row, Session

    session = Session(Bundle.open(bundle), TARGET, max_seq_len=PREFILL_TOKENS + DECODE_TOKENS)
    vocab = session.bundle.manifest.model.vocab_size
    prompt = tuple(index * 7919 % vocab for index in range(PREFILL_TOKENS))

    def prefill() -> Sequence:
        sequence = Sequence(session.pool)
        [result] = session.prefill([Row(sequence, prompt)])
        assert 0 <= result.next_token < vocab  # Waits for the device.
        return sequence

    def decode(sequence: Sequence) -> None:
        for _ in range(DECODE_TOKENS):
            [result] = session.decode([Row(sequence, (1,))])
            assert 0 <= result.next_token < vocab
        sequence.release()

    return _time(prefill, decode)


def time_torch(checkpoint: Path) -> tuple[float, float] | None:
    """The same of transformers in float16 with a model of the checkpoint's shapes; None where torch has no CUDA.

    Its weights are random, which changes no time.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    from transformers import AutoModelForCausalLM

    from llmir_iree.export.model import load_config
    from llmir_iree.params.checkpoint import open_checkpoint

    with open_checkpoint(checkpoint) as opened:
        config = load_config(opened.config)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).cuda().eval()
        prompt = torch.arange(PREFILL_TOKENS, device="cuda")[None] % config.vocab_size
        one = prompt[:, :1]

        def prefill() -> object:
            output = model(prompt, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            return output.past_key_values

        def decode(cache: object) -> None:
            for _ in range(DECODE_TOKENS):
                model(one, past_key_values=cache, use_cache=True).logits.argmax().item()

        return _time(prefill, decode)


def _time(prefill: Callable[[], object], decode: Callable[..., object]) -> tuple[float, float]:
    best = [float("inf")] * 2
    for _ in range(REPETITIONS + 1):  # The first one warms up; as the slowest it leaves no trace.
        times = [time.perf_counter()]
        state = prefill()
        times.append(time.perf_counter())
        decode(state)
        times.append(time.perf_counter())
        best = [min(best[0], times[1] - times[0]), min(best[1], times[2] - times[1])]
    return PREFILL_TOKENS / best[0], DECODE_TOKENS / best[1]


@click.command(cls=LlmirCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.pass_context
def main(ctx: click.Context, bundle: Path, checkpoint: Path) -> None:
    """Check BUNDLE on this machine's CUDA GPU, beside PyTorch on a model of CHECKPOINT's shapes.

    Exit code 1 if something is wrong, 0 also where there is no GPU.
    """
    gpu = find_gpu()
    if gpu is None:
        click.echo("no CUDA GPU here: nothing was checked", err=True)
        return
    from llmir_iree.check_targets import as_markdown, check_targets
    from llmir_iree.shape_models import read_model

    click.echo(f"{gpu}\n")
    checks = check_targets(read_model(str(bundle)), (TARGET,), device="cuda", whole=False)
    click.echo(as_markdown(checks, "Ops on the GPU"))
    with tempfile.TemporaryDirectory(prefix="llmir-check-") as folder:
        copy = copy_for_gpu(bundle, Path(folder))
        cpu, ours = compare_texts(copy)
        same = next((index for index, pair in enumerate(zip(cpu, ours, strict=True)) if pair[0] != pair[1]), TOKENS)
        click.echo(f"greedy text: {same} of {TOKENS} tokens as on the CPU")
        speeds = {"llmir-iree": time_ours(copy), "transformers, float16": time_torch(checkpoint)}
    for name, speed in speeds.items():
        told = "not timed: this build of torch has no CUDA" if speed is None else "prefill {:.0f}, decode {:.0f} tok/s"
        click.echo(f"{name}: {told.format(*(speed or ()))}")
    if checks.faults or same < TOKENS:
        ctx.exit(EXIT_ERROR - 1)


if __name__ == "__main__":
    main()
