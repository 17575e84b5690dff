"""The page of a comparison in a browser."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from llmir_iree.tracing.capture import Site
from llmir_iree.tracing.diff import CaptureDiff, compare_captures
from llmir_iree.tracing.explain import Explanation
from llmir_iree.tracing.ir_compare import Divergence
from llmir_iree.tracing.ir_configs import LoweringConfig
from llmir_iree.tracing.views.diff_page import diff_page

DOWN = "1x2048x5632"


def usual(site: Site) -> int:
    return {"quantized_matmul": (site.bytes_read or 0) // 20, "paged_attention": 90_000}.get(site.kind, 4_000)


@pytest.fixture
def compare(make_capture) -> Callable[..., CaptureDiff]:
    """Compares a capture with one that has other times or another manifest."""

    def run(durations=usual, **changes) -> CaptureDiff:
        manifest = make_capture(name="template").manifest.model_copy(update={"processes": 4})
        a = make_capture(manifest, durations=usual, name="a")
        b = make_capture(manifest.model_copy(update=changes), None, durations, name="b")
        return compare_captures(a, b)

    return run


@pytest.fixture
def slower(compare) -> CaptureDiff:
    return compare(lambda site: int(usual(site) * (1.6 if site.shape == DOWN else 1)))


def explain(diff: CaptureDiff, hunk: str) -> Explanation:
    """Explains the largest change by other tile sizes."""
    tiles = [(LoweringConfig("linalg.matmul", f"#config<distribution = [{size}]>"),) for size in (64, 16)]
    divergence = Divergence(
        pass_name="select-lowering-strategy",
        level="builtin.module",
        hunk=hunk,
        added=1,
        removed=1,
        only_a=("peel", "cse", "cse"),
        only_b=(),
        configs_a=tiles[0],
        configs_b=tiles[1],
    )
    return Explanation(diff.functions[0].function, diff.functions[0].rows[0], divergence, divergence.summary())


HUNK = f"""@@ -7,3 +7,3 @@
 a.b %0 "{"feature," * 40}"
-a.tile [64]
+a.tile [16]
 return"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "diff.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_says_what_changed(slower, browser, tmp_path, scheme):
    label = slower.functions[0].rows[0].label
    file = write(tmp_path, diff_page(slower, [explain(slower, HUNK)]))
    browser.open(file, scheme)
    browser.wait("document.querySelector('.waterfall li')")

    assert browser.run("return document.querySelector('h1').textContent") == slower.functions[0].summary()
    bars = browser.run(
        "return [...document.querySelectorAll('.waterfall li')].map((row) => "
        "[row.children[0].textContent.trim(), row.querySelector('.track span').className, row.children[3].textContent])"
    )
    assert bars[0] == ["A", "total", ""]
    assert bars[1] == [label, "worse", "slower"]
    assert bars[-1] == ["B", "total", ""]
    ends = browser.run(
        "return [...document.querySelectorAll('.waterfall .track span')].map((bar) => bar.getBoundingClientRect())"
        ".map((box) => [box.left, box.right])"
    )
    assert ends[1][0] == pytest.approx(ends[0][1], abs=1.5)  # The change begins where A ends,
    assert ends[-1][1] == pytest.approx(ends[1][1], abs=3)  # and B ends where it does, the rest being nothing.
    rows = browser.run(
        "return [...document.querySelectorAll('[aria-label^=Parts] tbody tr')].map((row) => row.innerText)"
    )
    assert len(rows) == len(slower.functions[0].rows)
    assert "+60" in rows[0]
    assert browser.run("return [...document.querySelectorAll('.code mark')].map((mark) => mark.textContent)") == [
        "64",
        "16",
    ]
    numbers = "return [...document.querySelectorAll('.code td.line')].map((cell) => cell.textContent.trim())"
    assert browser.run(numbers) == ["7", "7", "8\u2212", "8+", "9", "9"]
    assert "feature," * 40 in browser.run("return document.querySelector('.code').textContent")
    article = browser.run("return document.querySelector('article').textContent")
    assert "first parts at select-lowering-strategy: tile sizes of linalg.matmul" in article
    assert "peel, cse (2 times)" in article
    assert "#config<distribution = [16]>" in article
    browser.run("document.querySelectorAll('summary').forEach((summary) => summary.click())")
    assert browser.faint_texts() == []
    assert browser.logs("browser") == []
    assert browser.requests() == [file.as_uri()]


def test_what_is_on_one_side_only_is_shown(slower, browser, tmp_path):
    first, *rest = slower.functions[0].rows
    gone = replace(first, label="rotary", a_ns=9e4, b_ns=None, delta_ns=-9e4, change=None)
    new = replace(first, label="copy", a_ns=None, b_ns=3e6, delta_ns=3e6, change=None)
    wild = replace(rest[0], label="wild", change=replace(first.change, floor=inf, high=inf, is_called=False))
    function = replace(slower.functions[0], rows=(first, new, gone, wild, *rest))
    file = write(tmp_path, diff_page(replace(slower, functions=(function,))))
    browser.open(file)
    browser.wait("document.querySelector('.chip')")
    rows = browser.run(
        "return [...document.querySelectorAll('[aria-label^=Parts] tbody tr')].map((row) => "
        "[row.querySelector('.mono').textContent, row.querySelector('.chip')?.textContent ?? null,"
        " row.cells[6].textContent, row.lastChild.textContent])"
    )
    assert [row for row in rows if row[0] in ("copy", "rotary", "wild")] == [
        ["copy", "only in B", "", "new"],
        ["rotary", "only in A", "", "gone"],
        ["wild", None, "beyond measure", "within noise"],
    ]
    assert browser.run("return document.querySelectorAll('.waterfall .chip').length") == 2


def test_no_change_is_drawn_pale(compare, browser, tmp_path):
    diff = compare(lambda site: usual(site) + site.site % 3, target="<script>window.broken = 1</script>")
    browser.open(write(tmp_path, diff_page(diff)))
    browser.wait("document.querySelector('.waterfall li')")
    kinds = browser.run("return [...document.querySelectorAll('.waterfall .track span')].map((bar) => bar.className)")
    assert all("unsure" in kind for kind in kinds[1:-1])
    assert browser.run("return window.broken ?? null") is None


def test_narrow_screens_scroll_down_only(slower, browser, tmp_path):
    file = write(tmp_path, diff_page(slower, [explain(slower, f"@@ -1,1 +1,1 @@\n-{'a' * 300}\n+b")]))
    browser.open(file, width=340)
    browser.wait("document.querySelector('.waterfall li')")
    assert browser.run("return document.documentElement.scrollWidth") <= 340
