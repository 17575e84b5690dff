"""llmir-run: complete a prompt, or chat, with a compiled bundle."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand, show_error
from llmir_iree.params.errors import LlmirError

if TYPE_CHECKING:  # Imported when the command runs, so that --help is instant.
    from collections.abc import Iterator

    from llmir_iree.generate import LLM, Token, Usage
    from llmir_iree.sampling import SamplingParams

_CHAT_HELP = "/reset forgets the conversation, /stats tells about the last answer, /exit ends; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Stats:
    """What one answer took; `share` is the part of the machine's memory bandwidth that the decode reached.

    `machine_bytes_s` is None where the machine's bandwidth is not known.
    """

    usage: Usage
    machine_bytes_s: float | None
    peak_bytes: int

    @property
    def share(self) -> float | None:
        """Decode's reading against a plain read of memory, 0 to 1 (or a little more, where caches help)."""
        achieved = self.usage.decode_bytes_s
        return None if achieved is None or self.machine_bytes_s is None else achieved / self.machine_bytes_s

    def line(self) -> str:
        """All of it in one line."""
        usage = self.usage
        parts = [f"first token {usage.ttft_s:.3f} s", f"prefill {usage.prefill_tok_s or 0:.1f} tok/s"]
        if usage.decode_tok_s is not None and usage.decode_bytes_s is not None:
            parts.append(f"decode {usage.decode_tok_s:.1f} tok/s")
            reading = f"{usage.decode_bytes_s / 1e9:.1f} GB/s read"
            if self.machine_bytes_s is not None:
                reading += f", {self.share:.0%} of {self.machine_bytes_s / 1e9:.1f}"
            parts.append(reading)
        parts.append(f"peak memory {self.peak_bytes / 2**20:.0f} MiB")
        return " | ".join(parts)


@click.command("llmir-run", cls=LlmirCommand, context_settings={"max_content_width": 100})
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", metavar="TEXT", help="What to complete; - reads stdin. Without it: a chat on the terminal.")
@click.option("--chat", "is_chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the likeliest K tokens; 0 keeps all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep tokens up to this total probability.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Keep tokens this likely beside the best.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--target", help="Which of the bundle's compiled targets to run.")
@click.option("--device", help="IREE device URI; the target's driver by default.")
@click.option("--max-seq-len", type=int, help="Most tokens of prompt and answer together; less needs less memory.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object to stdout instead of the text.")
@click.option("--quiet", is_flag=True, help="No statistics on stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Tell on stderr what is loaded.")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    bundle: Path,
    prompt: str | None,
    is_chat: bool,
    system: str | None,
    target: str | None,
    device: str | None,
    max_seq_len: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **sampling: Any,
) -> None:
    """Run BUNDLE, a folder that llmir-export wrote, or one of the .vmfb files in it.

    The text goes to stdout as it comes, statistics to stderr.
    """
    if system is not None and not is_chat and prompt is not None:
        raise click.UsageError("--system needs --chat: a plain prompt has no system message")
    if prompt is None and as_json:
        raise click.UsageError("--json needs --prompt")
    if prompt is None and not _is_terminal():
        raise click.UsageError("there is no --prompt, and stdin is no terminal to chat on; --prompt - reads stdin")

    from llmir_iree.generate import LLM
    from llmir_iree.sampling import SamplingParams

    params = SamplingParams(**sampling)
    llm = LLM(bundle, target, device, max_seq_len=max_seq_len)
    if verbose:
        click.echo(_loaded_line(llm), err=True)
    if prompt is None:
        _Chat(ctx, llm, params, system).run()
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    stream = llm.stream_chat(_messages(system, text), params) if is_chat else llm.stream(text, params)
    if as_json:
        click.echo(_json(llm, list(stream)))
        return
    usage = _write(stream)
    if not quiet:
        click.echo(_measure(llm, usage).line(), err=True)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _messages(system: str | None, user: str) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": user}]


def _write(stream: Iterator[Token]) -> Usage:
    """Write the text to stdout as it comes, and end its line."""
    for token in stream:
        click.echo(token.text, nl=False)
    click.echo()
    return token.usage


def _measure(llm: LLM, usage: Usage) -> Stats:
    from llmir_iree.machine import peak_memory
    from llmir_iree.peaks import measure_bandwidth

    peak = peak_memory()  # First: measuring maps the weights once more.
    archive = llm.session.bundle.checked_parameters()
    return Stats(usage, measure_bandwidth(archive), peak)


def _json(llm: LLM, tokens: list[Token]) -> str:
    import json

    from llmir_iree.machine import anonymous_memory, cpu_name

    usage, session = tokens[-1].usage, llm.session
    anonymous = anonymous_memory()
    stats = _measure(llm, usage)
    achieved = usage.decode_bytes_s
    return json.dumps(
        {
            "text": "".join(token.text for token in tokens),
            "tokens": [token.token for token in tokens],
            "finish_reason": tokens[-1].finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "load_s": session.load_seconds,
            "ttft_s": usage.ttft_s,
            "prefill_s": usage.prefill_s,
            "prefill_tok_s": usage.prefill_tok_s,
            "decode_s": usage.decode_s,
            "decode_tok_s": usage.decode_tok_s,
            "bandwidth_gb_s": None if achieved is None else achieved / 1e9,
            "machine_bandwidth_gb_s": None if stats.machine_bytes_s is None else stats.machine_bytes_s / 1e9,
            "bandwidth_share": stats.share,
            "peak_rss_bytes": stats.peak_bytes,
            "anonymous_bytes": anonymous,
            "model": session.bundle.manifest.model.name,
            "target": session.target.target,
            "device": session.device_uri,
            "cpu": cpu_name(),
        },
        ensure_ascii=False,
    )


def _loaded_line(llm: LLM) -> str:
    session = llm.session
    plan, pool = session.memory_plan, session.pool
    return (
        f"{session.bundle.manifest.model.name} for {session.target.target} on {session.device_uri}, loaded in "
        f"{session.load_seconds:.3f} s: weights {plan.weights / 2**20:.0f} MiB, cache {plan.cache / 2**20:.0f} MiB "
        f"({pool.usable} pages of {pool.page_size} tokens), {session.max_seq_len} tokens at most"
    )


class _Chat:
    """A conversation on the terminal."""

    def __init__(self, ctx: click.Context, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._ctx = ctx
        self._llm = llm
        self._params = params
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._usage: Usage | None = None
        self._reset()

    def run(self) -> None:
        """Read lines and answer them, until /exit or Ctrl-D."""
        click.echo(_CHAT_HELP, err=True)
        while (line := _read_line()) is not None and line != "/exit":
            match line:
                case "":
                    continue
                case "/reset":
                    self._reset()
                case "/stats":
                    click.echo(self._stats(), err=True)
                case command if command.startswith("/"):
                    click.echo(f"no such command: {command}; {_CHAT_HELP}", err=True)
                case _:
                    self._answer(line)

    def _reset(self) -> None:
        self._llm.reset()
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _stats(self) -> str:
        return "no answer yet" if self._usage is None else _measure(self._llm, self._usage).line()

    def _answer(self, line: str) -> None:
        """Answer one line; what was said before an interrupt stays said."""
        self._messages.append({"role": "user", "content": line})
        said: list[str] = []
        try:
            for token in self._llm.stream_chat(self._messages, self._params):
                said.append(token.text)
                self._usage = token.usage
                click.echo(token.text, nl=False)
        except KeyboardInterrupt:
            pass
        except LlmirError as error:
            self._messages.pop()
            show_error(self._ctx, error)
            return
        click.echo()
        self._messages.append({"role": "assistant", "content": "".join(said)})


def _read_line() -> str | None:
    """A line from the terminal; "" after Ctrl-C, None after Ctrl-D."""
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    except EOFError:
        click.echo(err=True)
        return None
