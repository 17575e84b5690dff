"""How a module was made: found for a capture and for a dump, and compared."""

import json
from pathlib import Path

import pytest

from llmir_iree.bundle import Bundle, ModuleInfo
from llmir_iree.tracing.capture import MANIFEST_NAME, Capture, CaptureManifest, MachineInfo
from llmir_iree.tracing.recorded_modules import MODULE_NAME, describe_difference, find_module


def module(passes: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> ModuleInfo:
    sha256 = "0" * 64
    return ModuleInfo(
        file="cpu/decode.vmfb",
        sha256=sha256,
        flags=flags,
        passes=passes,
        implementations={},
        portable_sha256=sha256,
    )


def capture_of(folder: Path, subject: str, sha256: str) -> Path:
    """A capture of one module, which holds nothing but a manifest."""
    manifest = CaptureManifest(
        created="2026-03-01T12:00:00+00:00",
        subject=subject,
        phase="decode",
        functions=("decode_bs1",),
        processes=1,
        device="local-task",
        versions={},
        modules={"decode.vmfb": sha256},
        machine=MachineInfo(cpu="a processor", cores=1),
        sources=("ir",),
    )
    folder.mkdir()
    return Capture.create(folder, manifest).folder


def test_a_dump_tells_each_program(tmp_path: Path) -> None:
    known = module(("fold-silu-mul",), ("--a", "--b=1"))
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / MODULE_NAME).write_text(known.model_dump_json())
    assert find_module(tmp_path, "decode") == known
    assert find_module(tmp_path, "prefill") is None
    assert find_module(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "not json", json.dumps({"flags": 3})])
def test_what_cannot_be_read_is_not_known(tmp_path: Path, text: str) -> None:
    (tmp_path / MODULE_NAME).write_text(text)
    assert find_module(tmp_path) is None
    (tmp_path / MANIFEST_NAME).write_text(text)
    assert find_module(tmp_path) is None


def test_a_capture_is_led_back_to_its_bundle(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    [target, *_] = smollm2_bundle.manifest.targets.values()
    known = target.modules["decode"]
    subject = str(smollm2_bundle.folder.absolute())
    assert find_module(capture_of(tmp_path / "a.llmtrace", subject, known.sha256)) == known
    # Compiled anew since, or gone.
    assert find_module(capture_of(tmp_path / "b.llmtrace", subject, "0" * 64)) is None
    assert find_module(capture_of(tmp_path / "c.llmtrace", str(tmp_path / "gone"), known.sha256)) is None


def test_differences_are_told_side_by_side() -> None:
    a = module(("fold-silu-mul", "split-argmax"), ("--x", "--cpu=host"))
    b = module(("split-argmax",), ("--x", "--cpu=generic"))
    assert describe_difference(a, b) == (
        "passes of the plugin that only A was compiled with: fold-silu-mul",
        "flags that only A was compiled with: --cpu=host",
        "flags that only B was compiled with: --cpu=generic",
    )
    assert describe_difference(a, a) == ()
    assert describe_difference(a, None) == describe_difference(None, b) == ()
