"""The flame of text: what adds up, what is folded, and that every line fits."""

import pytest

from llmir_iree.tracing.capture import DispatchRun, Site, write_rows
from llmir_iree.tracing.views.flame import Branch, build_flame, render_flame
from llmir_iree.tracing.views.step import typical_steps


@pytest.fixture
def flame(make_capture):
    return build_flame(typical_steps(make_capture())[0])


def leaves(branch: Branch) -> int:
    return sum(map(leaves, branch.children)) if branch.children else branch.ns


def test_branches_add_up_to_the_call(make_capture, flame):
    step = typical_steps(make_capture(name="again"))[0]
    assert flame.ns == step.wall_ns
    assert leaves(flame) == step.wall_ns
    assert sum(child.ns for child in flame.children) == flame.ns


def test_layers_that_are_alike_share_a_branch(flame):
    names = [child.name for child in flame.children]
    assert names == ["layers 0-21, 1.54 ms each", "outside layers", "between dispatches"]
    [matmuls, *_] = flame.children[0].children
    assert matmuls.name == "quantized matmul"
    assert matmuls.children[0].name == "22 x blk.*.ffn_gate_up.weight 1x11264x2048"


def test_a_layer_that_stands_out_has_its_own_branch(make_capture):
    capture = make_capture(durations=lambda site: 100_000 if site.layer == 7 else 50_000)
    names = [child.name for child in build_flame(typical_steps(capture)[0]).children]
    assert [name.partition(",")[0] for name in names] == [
        "layers 0-6",
        "layer 7",
        "layers 8-21",
        "outside layers",
        "between dispatches",
    ]


def test_bars_stand_below_the_part_that_they_fill():
    children = (Branch("first", 400, (Branch("inner", 100),)), Branch("second", 500), Branch("tiny", 1))
    lines = render_flame(Branch("all", 1000, children), 81, is_ascii=True).plain.splitlines()
    bars = [line[line.index("%") + 3 :] for line in lines]
    width = len(bars[0])
    assert [line.split()[0] for line in lines] == ["all", "first", "inner", "second", "1"]
    assert bars[0] == "#" * width
    assert len(bars[1]) == pytest.approx(0.4 * width, abs=1)
    assert len(bars[2]) == pytest.approx(0.1 * width, abs=1)
    assert len(bars[3]) - len(bars[3].lstrip()) == pytest.approx(0.4 * width, abs=1)
    assert len(bars[3]) == pytest.approx(0.9 * width, abs=1)
    assert "1 smaller" in lines[4]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_every_line_fits(flame, width, is_ascii):
    text = render_flame(flame, width, is_ascii=is_ascii).plain
    assert max(map(len, text.splitlines())) <= max(width, 50)
    assert text.isascii() or not is_ascii


def test_dispatch_without_a_site_is_named_by_its_export(make_capture):
    capture = make_capture()
    write_rows(capture.folder, Site, capture.read(Site)[:1])
    step = typical_steps(capture)[0]
    [outside, _] = build_flame(step).children
    assert outside.name == "outside layers"
    assert [kind.name for kind in outside.children] == ["unknown", "embedding"]
    assert sum(run.duration_ns for run in step.runs) == outside.ns
    assert {run.key for run in capture.read(DispatchRun)} >= {run.key for run in step.runs}
