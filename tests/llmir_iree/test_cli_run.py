from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmir_iree import LLM, SamplingParams
from llmir_iree.cli import run as run_module
from llmir_iree.cli.run import main

COMMAND = [sys.executable, "-c", "from llmir_iree.cli.run import main; main(prog_name='llmir-run')"]


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="llmir-run", **options)


@pytest.fixture
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> float:
    from llmir_iree import peaks

    monkeypatch.setattr(peaks, "measure_bandwidth", lambda file: 20e9)
    return 20e9


# One prompt


def test_text_goes_to_stdout_and_statistics_to_stderr(tiny: Any, bandwidth: float) -> None:
    result = run(tiny.folder, "--prompt", "abc", "--max-tokens", 8, "--ignore-eos")
    assert result.exit_code == 0
    expected = LLM(tiny.folder).generate("abc", SamplingParams(max_tokens=8, ignore_eos=True)).text
    assert result.stdout == expected + "\n"
    (line,) = result.stderr.splitlines()
    number = r"[\d.]+"
    assert re.fullmatch(
        rf"first token {number} s \| prefill {number} tok/s \| decode {number} tok/s \| "
        rf"{number} GB/s read, \d+% of 20.0 \| peak memory \d+ MiB",
        line,
    )


def test_where_the_bandwidth_is_not_known_the_share_is_left_out(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmir_iree import peaks

    monkeypatch.setattr(peaks, "measure_bandwidth", lambda file: None)
    arguments = (tiny.folder, "--prompt", "abc", "--max-tokens", 4, "--ignore-eos")
    assert re.search(r"GB/s read \| peak memory", run(*arguments).stderr)
    data = json.loads(run(*arguments, "--json").stdout)
    assert (data["machine_bandwidth_gb_s"], data["bandwidth_share"]) == (None, None)
    assert data["bandwidth_gb_s"] > 0


def test_one_token_has_no_decode_speed(tiny: Any, bandwidth: float) -> None:
    result = run(tiny.folder, "--prompt", "abc", "--max-tokens", 1)
    assert "decode" not in result.stderr
    data = json.loads(run(tiny.folder, "--prompt", "abc", "--max-tokens", 1, "--json").stdout)
    assert (data["decode_tok_s"], data["bandwidth_gb_s"], data["bandwidth_share"]) == (None, None, None)


def test_quiet_leaves_stderr_empty(tiny: Any) -> None:
    assert run(tiny.folder, "--prompt", "abc", "--max-tokens", 3, "--quiet").stderr == ""


def test_verbose_tells_what_is_loaded(tiny: Any) -> None:
    result = run(tiny.folder, "--prompt", "abc", "--max-tokens", 3, "--quiet", "-v")
    assert "tiny for cpu on local-task, loaded in" in result.stderr
    assert "(16 pages of 4 tokens), 64 tokens at most" in result.stderr


def test_json_is_one_object_on_stdout(tiny: Any, bandwidth: float) -> None:
    result = run(tiny.folder / "cpu" / "decode.vmfb", "--prompt", "abc", "--max-tokens", 8, "--ignore-eos", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    completion = LLM(tiny.folder).generate("abc", SamplingParams(max_tokens=8, ignore_eos=True))
    assert data["text"] == completion.text
    assert data["tokens"] == list(completion.tokens)
    assert (data["finish_reason"], data["prompt_tokens"], data["completion_tokens"]) == ("length", 4, 8)
    assert (data["model"], data["target"], data["device"]) == ("tiny", "cpu", "local-task")
    assert data["prefill_tok_s"] == pytest.approx(4 / data["prefill_s"])
    assert data["decode_tok_s"] == pytest.approx(7 / data["decode_s"])
    assert data["bandwidth_gb_s"] * 1e9 * data["decode_s"] == pytest.approx(completion.usage.decode_bytes)
    assert data["bandwidth_share"] == pytest.approx(data["bandwidth_gb_s"] * 1e9 / bandwidth)
    assert data["peak_rss_bytes"] >= data["anonymous_bytes"] > 0
    assert data["ttft_s"] > 0


def test_a_prompt_comes_from_stdin(tiny: Any) -> None:
    options = ("--max-tokens", 5, "--quiet")
    assert (
        run(tiny.folder, "--prompt", "-", *options, input="abc").stdout
        == run(tiny.folder, "--prompt", "abc", *options).stdout
    )


def test_options_reach_the_sampler(tiny: Any) -> None:
    sampled = ("--max-tokens", 12, "--temperature", 3, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--seed", 4)
    params = SamplingParams(
        max_tokens=12, temperature=3, top_k=20, top_p=0.9, min_p=0.01, seed=4, stop=("q", "w"), ignore_eos=True
    )
    result = run(tiny.folder, "--prompt", "abc", *sampled, "--stop", "q", "--stop", "w", "--ignore-eos", "--quiet")
    assert result.stdout == LLM(tiny.folder).generate("abc", params).text + "\n"


def test_a_chat_prompt_takes_a_system_message(tiny: Any) -> None:
    messages = [{"role": "system", "content": "xy"}, {"role": "user", "content": "abc"}]
    expected = LLM(tiny.folder).chat(messages, SamplingParams(max_tokens=8)).text
    result = run(tiny.folder, "--chat", "--system", "xy", "--prompt", "abc", "--max-tokens", 8, "--quiet")
    assert result.stdout == expected + "\n"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no --prompt, and stdin is no terminal to chat on"),
        (("--prompt", "a", "--system", "b"), "--system needs --chat"),
        (("--json",), "--json needs --prompt"),
        (("--prompt", "a", "--max-tokens", "many"), "'many' is not a valid integer"),
    ],
)
def test_a_wrong_use_is_explained(tiny: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(tiny.folder, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top-p", "3"), "top_p is 3.0; it must be above 0, at most 1 (off)"),
        (("--target", "gpu"), "not compiled for gpu; compiled targets: cpu"),
        (("--device", "metal9"), "device 'metal9': this runtime has no driver 'metal9'"),
        (("--max-seq-len", "3"), "the prompt has 4 tokens; max_seq_len is 3, the answer's included"),
    ],
)
def test_a_refusal_is_one_line(tiny: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(tiny.folder, "--prompt", "abc", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("llmir-run: error: ")
    assert message in line


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "--prompt", "abc")
    assert (result.exit_code, result.stderr) == (
        2,
        f"llmir-run: error: {tmp_path}: not a bundle, it has no manifest.json\n",
    )
    result = run(tmp_path / "nothing", "--prompt", "abc")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


# The chat on a terminal


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Types lines at a terminal; an exception stands for its key."""

    def type_lines(*lines: str | type[BaseException]) -> None:
        rest = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(rest)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(run_module, "_is_terminal", lambda: True)

    return type_lines


def test_a_chat_answers_in_its_context(tiny: Any, typed: Any) -> None:
    typed("abc", "", "de", "/exit", "never read")
    params = SamplingParams(max_tokens=6)
    llm = LLM(tiny.folder)
    messages = [{"role": "user", "content": "abc"}]
    first = llm.chat(messages, params).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "de"}]
    second = llm.chat(messages, params).text
    result = run(tiny.folder, "--max-tokens", 6)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n"
    assert "/reset forgets the conversation" in result.stderr


def test_a_chat_can_be_reset_and_keeps_its_system_message(tiny: Any, typed: Any) -> None:
    typed("abc", "/reset", "abc")
    result = run(tiny.folder, "--max-tokens", 6, "--system", "xy")
    first, second = result.stdout.split("\n")[:2]
    messages = [{"role": "system", "content": "xy"}, {"role": "user", "content": "abc"}]
    assert first == second == LLM(tiny.folder).chat(messages, SamplingParams(max_tokens=6)).text


def test_a_chat_tells_statistics_and_refuses_other_commands(tiny: Any, typed: Any, bandwidth: float) -> None:
    typed("/stats", "abc", "/stats", "/what")
    result = run(tiny.folder, "--max-tokens", 6)
    lines = result.stderr.splitlines()
    assert lines[1] == "no answer yet"
    assert lines[2].startswith("first token ")
    assert lines[3].startswith("no such command: /what")


def test_a_refused_message_does_not_end_a_chat(tiny: Any, typed: Any) -> None:
    typed("a" * 99, "abc")
    result = run(tiny.folder, "--max-tokens", 6)
    assert result.exit_code == 0
    assert "llmir-run: error: the prompt has 103 tokens; max_seq_len is 64" in result.stderr
    assert (
        result.stdout
        == LLM(tiny.folder).chat([{"role": "user", "content": "abc"}], SamplingParams(max_tokens=6)).text + "\n"
    )


def test_an_interrupt_stops_an_answer_only(tiny: Any, typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed("abc", KeyboardInterrupt, "de")
    asked = []
    stream_chat = LLM.stream_chat

    def interrupted(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> Any:
        asked.append([dict(message) for message in messages])
        stream = stream_chat(llm, messages, params)
        yield next(stream)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from stream

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    result = run(tiny.folder, "--max-tokens", 6, "--ignore-eos")
    assert result.exit_code == 0
    said = result.stdout.split("\n")[0]
    assert asked[1] == [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "de"},
    ]


# As a program


def test_help_is_instant() -> None:
    program = "import sys; from llmir_iree.cli.run import main; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {"numpy", "iree", "tokenizers", "rich", "pydantic", "jinja2", "torch", "gguf"} & set(loaded)


def test_a_program_keeps_its_streams_apart(tiny: Any) -> None:
    arguments = [str(tiny.folder), "--prompt", "abc", "--max-tokens", "4", "--ignore-eos"]
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout == LLM(tiny.folder).generate("abc", SamplingParams(max_tokens=4, ignore_eos=True)).text + "\n"
    assert len(result.stderr.splitlines()) == 1
    refused = subprocess.run([*COMMAND, *arguments, "--device", "no"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("llmir-run: error: device 'no'")
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_ends_a_program_with_130(tiny: Any) -> None:
    """Interrupted while it waits for its prompt, where the test can be sure that it is."""
    process = subprocess.Popen(
        [*COMMAND, str(tiny.folder), "--prompt", "-", "-v"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As on a terminal, even where these tests run in the background, whose programs ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    loaded = process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stdout, stderr) == (130, "", "\n")
    assert loaded.startswith("tiny for cpu")
