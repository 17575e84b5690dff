"""Packed histories: what is unpacked is what was packed, and only what changed counts."""

import base64
import json
import zlib

from hypothesis import given
from hypothesis import strategies as st

from llmir_iree.tracing.views.pass_history import PassChange, line_edits, pack_history

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
