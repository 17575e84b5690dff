"""Which modules run on which device, and a model on Vulkan, by Mesa's implementation on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from llmir_iree import devices
from llmir_iree.bench import BenchOptions, run_bench
from llmir_iree.bench_engines import BundleEngine
from llmir_iree.bundle import Bundle
from llmir_iree.cli import run as run_cli
from llmir_iree.compile import compile_bundle
from llmir_iree.devices import Subgroups, choose_target, parse_subgroups
from llmir_iree.pages import Sequence
from llmir_iree.params.errors import BundleError, TargetError
from llmir_iree.session import Row, Session
from llmir_iree.targets import resolve_target

CHUNK = 64
WORDS = 96
INFO = """name: some GPU
features: subgroupSizeControl=yes cooperativeMatrix=no
subgroup: size=64 operations=0x000000bf quadOperationsInAllStages=no minSubgroupSize=32 maxSubgroupSize=64 required=0
queue_families: 1
"""


@pytest.fixture(scope="module")
def bundle(exported: Bundle) -> Bundle:
    """A tiny model for the CPU and for llvmpipe, both without kernels."""
    for name in ("llvm-cpu", "vulkan:llvmpipe"):
        compile_bundle(exported, resolve_target(name), implementations="portable")
    return exported


@pytest.fixture(scope="module")
def on_cpu(bundle: Bundle) -> Session:
    return Session(bundle, "llvm-cpu")


@pytest.fixture(scope="module")
def on_vulkan(bundle: Bundle, lavapipe: str) -> Session:
    return Session(bundle, device=lavapipe)


def write_manifest(bundle: Bundle, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Bundle:
    """A folder with nothing but a changed manifest."""
    data = json.loads(bundle.manifest.model_dump_json())
    edit(data["targets"])
    (folder / "manifest.json").write_text(json.dumps(data))
    return Bundle.open(folder)


# What a device says


def test_subgroup_sizes_are_read_from_what_the_driver_says() -> None:
    subgroups = parse_subgroups(INFO)
    assert subgroups == Subgroups(64, 32, 64)
    assert [subgroups.has(size) for size in (8, 32, 64, 128)] == [False, True, True, False]
    assert parse_subgroups(INFO.replace("minSubgroupSize=32 maxSubgroupSize=64", "minSubgroupSize=0 maxSubgroupSize=0"))
    assert parse_subgroups("name: some GPU") is None


def test_lavapipe_tells_its_subgroup_size(lavapipe: str) -> None:
    assert devices.subgroups_of(lavapipe) == Subgroups(8, 8, 8)
    with pytest.raises(TargetError, match=r"device 'vulkan://9': there is no such device; there are vulkan://GPU-"):
        devices.subgroups_of("vulkan://9")


# Which modules


def test_a_device_chooses_the_modules(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "subgroups_of", lambda _: Subgroups(8, 8, 8))
    assert choose_target(bundle, None, "vulkan")[0].target == "vulkan:llvmpipe"
    assert choose_target(bundle, None, "local-sync")[0].target == "llvm-cpu"
    assert choose_target(bundle, "llvm-cpu", None) == (bundle.target("llvm-cpu"), "local-task")
    with pytest.raises(BundleError, match="compiled targets: llvm-cpu, vulkan:llvmpipe; name one"):
        choose_target(bundle, None, None)


def test_a_device_of_another_driver_is_refused(bundle: Bundle) -> None:
    with pytest.raises(TargetError, match="the modules for llvm-cpu run on local-task, not on vulkan"):
        choose_target(bundle, "llvm-cpu", "vulkan")
    with pytest.raises(TargetError, match=r"nothing that is compiled runs on cuda; compiled .*makes more: cuda\)"):
        choose_target(bundle, None, "cuda")


def test_modules_for_other_subgroups_are_refused(bundle: Bundle, lavapipe: str, tmp_path: Path) -> None:
    def widen(targets: dict[str, Any]) -> None:
        targets["vulkan:rdna3"] = targets.pop("vulkan:llvmpipe") | {"target": "vulkan:rdna3", "subgroup_size": 32}

    changed = write_manifest(bundle, tmp_path, widen)
    message = r"made for subgroups of 32 lanes .* which has 8; compile for one of vulkan:llvmpipe$"
    for name in ("vulkan:rdna3", None):
        with pytest.raises(TargetError, match=message):
            choose_target(changed, name, lavapipe)


def test_the_one_of_several_that_fits_is_chosen(bundle: Bundle, lavapipe: str, tmp_path: Path) -> None:
    def add(targets: dict[str, Any]) -> None:
        targets["vulkan"] = targets["vulkan:llvmpipe"] | {"target": "vulkan", "subgroup_size": 32}

    assert choose_target(write_manifest(bundle, tmp_path, add), None, lavapipe)[0].target == "vulkan:llvmpipe"

    def add_twin(targets: dict[str, Any]) -> None:
        targets["twin"] = targets["vulkan:llvmpipe"] | {"target": "twin"}

    with pytest.raises(BundleError, match=r"vulkan:llvmpipe, twin run on vulkan.*; name one with --target"):
        choose_target(write_manifest(bundle, tmp_path, add_twin), None, lavapipe)


def test_the_command_line_says_so_in_one_line(bundle: Bundle) -> None:
    target = bundle.target("vulkan:llvmpipe")
    arguments = [str(bundle.path(target.modules["decode"].file)), "--prompt", "a", "--device", "local-task"]
    result = CliRunner().invoke(run_cli.main, arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_an_unknown_cpu_is_refused_before_anything_is_compiled(bundle: Bundle) -> None:
    with pytest.raises(TargetError, match=r"target 'llvm-cpu:zen4': unknown chip; known for x86_64: .*znver4"):
        compile_bundle(bundle, resolve_target("llvm-cpu:zen4"))
    assert not bundle.path("llvm-cpu-zen4").exists()


# A model on Vulkan


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(map(int, np.random.default_rng(seed).integers(0, WORDS, count)))


def test_gpu_targets_prefill_in_chunks(bundle: Bundle, on_vulkan: Session, on_cpu: Session) -> None:
    assert bundle.target("vulkan:llvmpipe").phases == ("prefill_chunk", "decode")
    assert on_vulkan.prefill_tokens == CHUNK
    assert bundle.target("llvm-cpu").phases == ("prefill", "decode")
    with pytest.raises(BundleError, match="the modules for llvm-cpu have no prefill_chunk; they have prefill, decode"):
        on_cpu._function("prefill_chunk", 1)


@pytest.mark.parametrize("length", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunks_and_steps_give_what_the_cpu_gives(on_vulkan: Session, on_cpu: Session, length: int) -> None:
    prompt = tokens(length, seed=length)
    logits = []
    for session in (on_cpu, on_vulkan):
        sequence = Sequence(session.pool)
        [result] = session.prefill([Row(sequence, prompt)])
        steps = [result.logits()]
        for token in tokens(3, seed=1):
            [result] = session.decode([Row(sequence, (token,))])
            steps.append(result.logits())
        logits.append(np.stack(steps))
        sequence.release()
    # The same operations on float32 in another order; the cache holds float16, of which a key may be rounded to either
    # neighbour.
    np.testing.assert_allclose(logits[1], logits[0], rtol=2**-9, atol=2**-9 * np.abs(logits[0]).max())


def test_rows_of_a_batch_on_vulkan(on_vulkan: Session, on_cpu: Session) -> None:
    prompts = (tokens(5), tokens(70, seed=3))
    chosen = []
    for session in (on_cpu, on_vulkan):
        sequences = [Sequence(session.pool) for _ in prompts]
        session.prefill([Row(sequence, prompt) for sequence, prompt in zip(sequences, prompts, strict=True)])
        chosen.append([result.next_token for result in session.decode([Row(one, (4,)) for one in sequences])])
        for sequence in sequences:
            sequence.release()
    assert chosen[0] == chosen[1]


def test_a_cache_of_vulkan_is_written_and_read(on_vulkan: Session) -> None:
    values = np.random.default_rng(5).standard_normal(on_vulkan.read_cache().shape).astype(np.float16)
    on_vulkan.write_cache(values)
    np.testing.assert_array_equal(on_vulkan.read_cache(), values)
    on_vulkan.write_cache(np.zeros_like(values))


def test_a_benchmark_runs_on_vulkan(bundle: Bundle, lavapipe: str) -> None:
    options = BenchOptions(bundle.folder, ("pp70", "tg4"), (2,), repetitions=1, device=lavapipe)
    report = run_bench(options)
    assert [(row.test, row.batch, row.mean > 0) for row in report.rows] == [("pp70", 2, True), ("tg4", 2, True)]
    # Peaks are the host's, which are none of this device's.
    assert report.header.bandwidth_gb_s is None
    assert report.header.target == f"vulkan:llvmpipe on {lavapipe}"


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1])
def test_a_benchmark_prefills_in_chunks_what_it_prefills_at_once(bundle: Bundle, lavapipe: str, length: int) -> None:
    prompts = np.stack([tokens(length, seed) for seed in (1, 2)]).astype(np.int32)
    after = np.array([[3], [4]], np.int32)
    logits = []
    for target, device in (("llvm-cpu", None), (None, lavapipe)):
        engine = BundleEngine(bundle, target, device, [(2, length + 1)])
        engine.start(2, length + 1)
        engine.step(prompts)
        first = engine.logits().copy()
        engine.step(after)
        logits.append(np.stack([first, engine.logits()]))
    np.testing.assert_allclose(logits[1], logits[0], rtol=2**-9, atol=2**-9 * np.abs(logits[0]).max())
