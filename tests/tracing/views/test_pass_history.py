"""Packed histories: what is unpacked is what was packed, and only what changed counts."""

import base64
import json
import shutil
import zlib

from hypothesis import given
from hypothesis import strategies as st

from llmir_iree.tracing.capture import Capture
from llmir_iree.tracing.machine_code import find_assembly, find_llvm
from llmir_iree.tracing.views import pass_history
from llmir_iree.tracing.views.pass_history import PassChange, capture_histories, line_edits, pack_history

LINES = st.lists(st.sampled_from(["%0 = a.b", "%1 = a.b", "%1 = a.c %0", "return", "}", ""]), max_size=12)


def apply(edits, before: list[str]) -> list[str]:
    result, at = [], 0
    for start, removed, inserted, _ in edits:
        assert start >= at
        result += before[at:start] + list(inserted)
        at = start + removed
    return result + before[at:]


@given(LINES, LINES)
def test_edits_lead_from_one_text_to_the_other(before, after):
    edits = line_edits("\n".join(before), "\n".join(after))
    # A line at the end that is empty is no line.
    old, new = "\n".join(before).splitlines(), "\n".join(after).splitlines()
    assert apply(edits, old) == new
    assert bool(edits) == (old != new)


def test_values_named_anew_are_quiet():
    before = "%0 = a.x\n%1 = a.y %0\n%2 = a.z %1"
    after = "%0 = a.x\n%1 = a.new\n%2 = a.y %0\n%3 = a.z %2"
    edits = line_edits(before, after)
    assert [(start, removed, is_quiet) for start, removed, _, is_quiet in edits] == [(1, 0, False), (1, 2, True)]
    renamed = line_edits(before, before.replace("%2", "%c"))
    assert [is_quiet for *_, is_quiet in renamed] == [False]


def test_history_is_unpacked_part_by_part():
    changes = [
        PassChange("first", "hal.executable", {"function": "a\nb", "attributes": "x = 1"}),
        PassChange("second", "func.func", {"function": "a\nc\nb"}),
        PassChange("third", "hal.executable", {"attributes": "x = 2"}),
        PassChange("last", "hal.executable", {"function": None}),
    ]
    history = pack_history(changes)
    assert [(step["pass"], step["added"], step["removed"]) for step in history.steps] == [
        ("first", 3, 0),
        ("second", 1, 0),
        ("third", 1, 1),
        ("last", 0, 3),
    ]
    packed = json.loads(zlib.decompress(base64.b64decode(history.packed)))
    texts: dict[tuple[int, str], list[str]] = {}
    for number, (parts, change) in enumerate(zip(packed, changes, strict=True)):
        for name, base, edits in parts:
            texts[number, name] = apply(edits, texts.get((base, name), []))
            assert texts[number, name] == (change.parts[name] or "").splitlines()


def test_long_histories_pack_small():
    text = "\n".join(f"%{line} = vector.fma %a{line}, %b{line * 7919} : vector<16xf32>" for line in range(2000))
    changes = [
        PassChange("p", "func.func", {"function": text.replace("%1000 =", f"%1000 = a.b{step},")}) for step in range(50)
    ]
    history = pack_history(changes)
    assert len(history.packed) < len(text) / 2


def test_stages_stand_behind_the_passes_as_they_are() -> None:
    changes = [
        PassChange("first", "func.func", {"function": "a"}),
        PassChange("LLVM IR", "", {"LLVM IR": "b\nc"}, True),
    ]
    history = pack_history(changes)
    assert [step["isStage"] for step in history.steps] == [False, True]
    packed = json.loads(zlib.decompress(base64.b64decode(history.packed)))
    [[name, base, edits]] = packed[1]
    assert (name, base, apply(edits, [])) == ("LLVM IR", -1, ["b", "c"])


def test_a_capture_has_llvm_ir_and_assembly_behind_its_passes(small_capture) -> None:
    histories = {export: list(changes) for export, changes in capture_histories(small_capture).items()}
    assert len(histories) == 2
    for export, changes in histories.items():
        assert [change.name for change in changes if change.is_stage] == ["LLVM IR", "Assembly"]
        llvm, assembly = changes[-2].parts["LLVM IR"], changes[-1].parts["Assembly"]
        assert f"{find_llvm(small_capture.ir, (export,))}" == f"{llvm}\n"
        assert f"{find_assembly(small_capture.ir, (export,))}" == f"{assembly}\n"


def test_a_capture_without_machine_code_has_passes_alone(small_capture, tmp_path) -> None:
    copy = tmp_path / "copy.llmtrace"
    shutil.copytree(small_capture.folder, copy, ignore=shutil.ignore_patterns("binaries"))
    histories = capture_histories(Capture.open(copy))
    assert [change.name for changes in histories.values() for change in changes if change.is_stage] == []


def test_of_long_machine_code_the_beginning_is_shown(small_capture, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pass_history, "_MOST_LINES", 10)
    [export, *_] = capture_histories(small_capture)
    for stage, option in zip(pass_history.read_stages(small_capture, export), ("llvm", "asm"), strict=True):
        *lines, rest = (stage.parts[stage.name] or "").splitlines()
        assert len(lines) == 10
        assert rest.endswith(f"lines more: llmir-trace ir --stage {option} shows them")
