"""The samples, run as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmir_iree.bundle import Bundle

SAMPLES = Path(__file__).parents[1] / "samples"

# What each sample says on a bundle: arguments, and a pattern of its stdout.
ON_A_BUNDLE = {
    "generate.py": (("The capital of France is",), r"Paris"),
    "batch.py": (
        ("The sun is", "Ice is"),
        r"The sun is\|[^|]+\n  \d+ tokens, ended by \w+\nIce is\|[^|]+ended by \w+\n",
    ),
    "conversation.py": ((), r"(?s).+ 0 from the cache\n.+ [1-9]\d* from the cache\n"),
}


def run(sample: str, folder: Path, *arguments: str) -> str:
    """Run a sample elsewhere than in the repository, so that it finds the installed package alone; its stdout."""
    command = [sys.executable, str(SAMPLES / sample), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_custom_op_module_agrees_with_torch(tmp_path: Path) -> None:
    output = run("custom_op_module.py", tmp_path)
    difference = re.search(r"largest difference from torch: (\S+),", output)
    assert difference, output
    assert float(difference[1]) < 1e-4


def test_match_torch_model_agrees_with_torch(tmp_path: Path) -> None:
    output = run("match_torch_model.py", tmp_path)
    assert (
        "quantize_activations: 2 by cpu-kernels\nmultiply: 2 by cpu-kernels\npaged_attention: 1 by cpu-kernels"
        in output
    )
    difference = re.search(r"largest difference from torch: (\S+) of", output)
    assert difference, output
    assert float(difference[1]) < 0.02


@pytest.mark.parametrize("sample", ON_A_BUNDLE)
def test_samples_on_a_bundle(sample: str, smollm2_bundle: Bundle, tmp_path: Path) -> None:
    arguments, expected = ON_A_BUNDLE[sample]
    output = run(sample, tmp_path, str(smollm2_bundle.folder.absolute()), *arguments)
    assert re.match(expected, output.lstrip()), output


def test_every_program_is_run_and_is_in_the_readme() -> None:
    programs = {path.name for path in SAMPLES.glob("*.py")}
    assert programs == {*ON_A_BUNDLE, "custom_op_module.py", "match_torch_model.py"}
    listed = re.findall(r"^\| `(\w+\.py)", (SAMPLES / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert programs == set(listed)
