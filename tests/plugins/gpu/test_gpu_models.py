"""A whole model with what is chosen for GPUs: what lavapipe answers."""

import shutil
from pathlib import Path

import iree.runtime as rt

from llmir_iree import LLM, SamplingParams
from llmir_iree.bundle import PARAMETERS_NAME, Bundle
from llmir_iree.compile import compile_bundle
from llmir_iree.targets import resolve_target
from tests.plugins.gpu.conftest import LAVAPIPE


def test_lavapipe_says_what_the_cpu_says(smollm2_bundle: Bundle, vulkan_device: rt.HalDevice, tmp_path: Path) -> None:
    folder = tmp_path / "smollm2"
    shutil.copytree(smollm2_bundle.folder, folder, ignore=shutil.ignore_patterns(PARAMETERS_NAME))
    (folder / PARAMETERS_NAME).symlink_to(smollm2_bundle.path(PARAMETERS_NAME).resolve())
    compile_bundle(Bundle.open(folder), resolve_target(LAVAPIPE))
    params = SamplingParams(max_tokens=32, temperature=0.0)
    said = {
        target: LLM(folder, target=target, max_seq_len=256).generate("The capital of France is", params).text
        for target in ("llvm-cpu", LAVAPIPE)
    }
    assert len(said["llvm-cpu"]) > 32
    assert said[LAVAPIPE] == said["llvm-cpu"]
