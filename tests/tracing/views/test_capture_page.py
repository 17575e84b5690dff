"""The page of a capture in a browser: what it draws, how it is walked by keyboard, and what it must not do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmir_iree.tracing.capture import CaptureError, Site, ZoneTotal
from llmir_iree.tracing.views.capture_page import capture_page
from llmir_iree.tracing.views.pass_history import PassChange, capture_histories, read_stages

FFN = "decode$async_dispatch_7_quantized_matmul_1x11264x2048_i8xi8xf32"
DOWN = "decode$async_dispatch_9_quantized_matmul_1x2048x5632_i8xi8xf32"

BEFORE = "\n".join(
    [
        'func.func @matmul(%arg0: memref<4x8xf32>) attributes {info = #iree_codegen.info<"' + "+avx," * 60 + '">} {',
        *(f"  %{line} = arith.addf %arg0, %c{line} {{n = {line} : i64}} : vector<8xf32>" for line in range(60)),
        "}",
    ]
)
AFTER = BEFORE.replace("%20 = arith.addf", "%20 = arith.mulf").removesuffix("}") + "  return // done\n}"
HISTORY = [
    PassChange("canonicalize", "func.func", {"function": BEFORE}),
    PassChange("iree-llvmcpu-virtual-vector-lowering", "func.func", {"function": AFTER}),
]


@pytest.fixture
def page(make_capture, tmp_path: Path) -> Path:
    """That of a decode step with 22 layers, with the history of one dispatch."""
    file = tmp_path / "capture.html"
    file.write_text(capture_page(make_capture(), {FFN: HISTORY}), encoding="utf-8")
    return file


def focused(browser) -> str:
    return browser.run(
        "const at = document.activeElement; return at.getAttribute('aria-label') ?? at.textContent.trim().slice(0, 30)"
    )


def open_dispatch(browser, key: str) -> None:
    browser.run(
        "[...document.querySelectorAll('tbody button')].find((button) => button.textContent === args[0]).click()", key
    )
    browser.wait("document.querySelector('dialog[open]')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_draws_everything_and_asks_the_network_for_nothing(page, browser, scheme):
    browser.open(page, scheme)
    browser.wait("document.querySelectorAll('[role=option]').length > 200")

    assert browser.run("return document.querySelector('h1').textContent") == "decode takes 36.7 ms"
    headings = browser.run("return [...document.querySelectorAll('section h2')].map((heading) => heading.textContent)")
    assert headings == ["Step", "Kinds", "Roofline", "Layers", "Dispatches"]
    assert browser.run("return document.querySelectorAll('[id^=run-]').length") == 200
    assert browser.run("return document.querySelectorAll('[id^=layer-]').length") == 23
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 12
    assert browser.logs("browser") == []
    assert browser.requests() == [page.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(page, browser, scheme):
    browser.open(page, scheme)
    browser.wait("document.querySelectorAll('[role=option]').length > 200")
    browser.run("document.querySelector('summary').click()")
    browser.run("for (let i = 0; i < 6; i++) document.querySelector('[aria-label=\"Zoom in\"]').click()")
    assert browser.run("return document.querySelectorAll('.on-bar').length") > 0
    assert browser.faint_texts() == []

    open_dispatch(browser, FFN)
    browser.press("Down")
    browser.wait("document.querySelector('.code mark')")
    assert browser.faint_texts() == []


def test_timeline_is_walked_and_zoomed_by_keys(page, browser):
    browser.open(page)
    browser.wait("document.querySelector('#run-0')")
    for _ in range(20):
        browser.press("Tab")
        if focused(browser).startswith("Dispatches of the step"):
            break
    active = "document.activeElement.getAttribute('aria-activedescendant')"
    assert browser.run(f"return {active}") == "run-0"
    browser.press("Right", "Right")
    assert browser.run(f"return {active}") == "run-2"
    label = browser.run(f"return document.getElementById({active}).getAttribute('aria-label')")
    assert "blk.0.attn_qkv.weight" in label
    assert "layer 0" in label
    assert "GB/s" in label
    assert browser.run("return document.activeElement.nextElementSibling.textContent").startswith("blk.0.attn_qkv")

    wide = float(browser.run("return document.querySelector('#run-2').getAttribute('width')"))
    browser.press("+", "+", "+")
    assert float(browser.run("return document.querySelector('#run-2').getAttribute('width')")) > 3 * wide
    assert browser.run("return document.querySelectorAll('[role=option][id^=run-]').length") < 200
    browser.press("End")
    assert browser.run("return Boolean(document.querySelector('#run-199.active'))")
    browser.press("0")
    assert browser.run("return document.querySelectorAll('[id^=run-]').length") == 200


def test_enter_opens_a_dispatch_and_escape_leads_back(page, browser):
    browser.open(page)
    browser.wait("document.querySelector('#run-7')")
    browser.run("document.querySelector('[role=listbox]').focus()")
    browser.press("Home", *["Right"] * 7, "Enter")
    browser.wait("document.querySelector('dialog[open] .code tr')")
    assert browser.run("return document.querySelector('dialog h2').textContent") == FFN
    assert focused(browser) == "Passes that changed it"

    browser.press("Down")
    browser.wait("document.querySelector('.code td.more')")
    assert browser.run("return document.querySelector('.passes [aria-selected=true] .pass').textContent") == (
        "iree-llvmcpu-virtual-vector-lowering"
    )
    assert browser.run("return [...document.querySelectorAll('.code mark')].map((mark) => mark.textContent)") == [
        "add",
        "mul",
    ]
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog[open]')")
    assert focused(browser).startswith("Dispatches of the step")


def test_ir_of_a_pass_is_what_the_pass_left(page, browser):
    browser.open(page)
    browser.wait("document.querySelector('tbody button')")
    open_dispatch(browser, FFN)
    browser.wait("document.querySelector('.code tr')")
    assert "characters" in browser.run("return document.querySelector('.code i').textContent")  # Of a long string.
    browser.press("Down")
    browser.wait("document.querySelector('.code td.more')")
    assert browser.run("return document.querySelectorAll('.code tr.gap').length") == 2
    folded = browser.run("return document.querySelectorAll('.code tr').length")
    browser.run("document.querySelector('.code tr.gap button').click()")
    assert browser.run("return document.querySelectorAll('.code tr').length") > folded
    browser.run(
        "[...document.querySelectorAll('dialog .tool')].find((tool) => tool.textContent === 'Whole text').click()"
    )
    sides = browser.run(
        "return [1, 3].map((column) => [...document.querySelectorAll('.code tr')]"
        ".map((row) => row.cells[column]).filter((cell) => !cell.classList.contains('none'))"
        ".map((cell) => cell.textContent).join('\\n'))"
    )
    assert sides == [BEFORE, AFTER]
    kinds = browser.run(
        "return [...new Set([...document.querySelectorAll('.code span')].map((span) => span.className))].sort()"
    )
    assert kinds == ["t-comment", "t-number", "t-op", "t-ssa", "t-string", "t-symbol", "t-type"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_llvm_ir_and_assembly_stand_behind_the_passes(small_capture, browser, tmp_path, scheme):
    histories = {export: list(changes) for export, changes in capture_histories(small_capture).items()}
    key = next(export for export in histories if "softmax" in export)
    stages = {stage.name: stage.parts[stage.name] for stage in read_stages(small_capture, key)}
    file = tmp_path / "small.html"
    file.write_text(capture_page(small_capture, histories), encoding="utf-8")
    browser.open(file, scheme)
    browser.wait("document.querySelector('tbody button')")
    open_dispatch(browser, key)
    browser.wait("document.querySelector('.code tr')")
    # They are no passes.
    told = (
        "return [...document.querySelectorAll('[aria-label=\"Table of dispatches\"] tbody tr')]"
        ".map((row) => row.lastChild.textContent)"
    )
    counts = [sum(not change.is_stage for change in changes) for changes in histories.values()]
    assert sorted(browser.run(told)) == sorted(["", *map(str, counts)])
    shown = "return [...document.querySelectorAll('.code tr')].map((row) => row.cells[3].textContent).join('\\n')"
    chosen = "document.querySelector('.passes [aria-selected=true]')"
    for press, name in (("End", "Assembly"), ("Up", "LLVM IR")):
        browser.press(press)
        browser.wait(f"document.querySelector('.diff h3').textContent.includes({name!r})")
        told = browser.run(f"return [...{chosen}.children].map((child) => child.textContent)")
        assert told == [name, f"{len(stages[name].splitlines()):,} lines", "what LLVM made of it"]
        heading = browser.run("return document.querySelector('.diff h3').textContent")
        assert heading.endswith(f"{name}, what LLVM made of it")
        assert browser.run(shown).splitlines()[:1000] == stages[name].splitlines()[:1000]
        assert browser.run("return document.querySelectorAll('.code .more, .code .less').length") == 0
        assert browser.faint_texts() == []
    browser.press("Up")
    browser.wait("document.querySelector('.code .more')")
    assert browser.logs("browser") == []


def test_every_stop_of_tab_is_seen(page, browser):
    browser.open(page)
    browser.wait("document.querySelectorAll('[role=option]').length > 200")
    stops = []
    for _ in range(34):
        browser.press("Tab")
        width, style = browser.run(
            "const style = getComputedStyle(document.activeElement); return [style.outlineWidth, style.outlineStyle]"
        )
        stops.append(focused(browser))
        assert style != "none", stops[-1]
        assert float(width.removesuffix("px")) >= 1, stops[-1]
    in_order = ["Skip to the page", "Versions and flags", "Zoom out", "Dispatches of the step, in order of time"]
    in_order += ["Dispatches under the roofs of the machine, longest first", "Layers of the model", "By export"]
    in_order += ["Show only rows with these words", "Table of dispatches", "Share"]
    assert [stop for stop in stops if stop in in_order] == in_order


def test_a_kind_chosen_is_seen_alone(page, browser):
    browser.open(page)
    browser.wait("document.querySelector('.kinds button')")
    browser.run("document.querySelector('.kinds button[data-kind=paged_attention]').focus()")
    browser.press("Enter")
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 1
    assert browser.run("return document.querySelectorAll('[id^=run-]:not(.dim)').length") == 22
    assert browser.run("return document.activeElement.getAttribute('aria-pressed')") == "true"
    browser.press("Enter")
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 12


def test_table_sorts_filters_and_splits_by_call_site(page, browser):
    browser.open(page)
    browser.wait("document.querySelector('thead th button')")
    cells = "return [...document.querySelectorAll('tbody tr')].map((row) => row.cells[args[0]].textContent)"
    assert browser.run(cells, 6)[0].startswith("43.5%")
    browser.run("[...document.querySelectorAll('thead button')].find((head) => head.textContent === 'Calls').focus()")
    browser.press("Enter")
    assert browser.run("return document.querySelector('[aria-sort]').textContent") == "Calls"
    *counts, between = browser.run(cells, 2)
    assert between == ""
    assert list(map(int, counts)) == sorted(map(int, counts), reverse=True)
    browser.press("Enter")
    assert browser.run(cells, 2)[0] == "1"

    by_site = "[...document.querySelectorAll('.tool')].find((tool) => tool.textContent === 'By call site')"
    browser.run(f"{by_site}.click()")
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 201
    browser.run("document.querySelector('input[type=search]').focus()")
    browser.press(*"blk.21.ffn")
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 2


def test_enter_on_a_layer_shows_it_in_the_step(page, browser):
    browser.open(page)
    browser.wait("document.querySelector('#layer-0')")
    browser.run("document.querySelector('[aria-label=\"Layers of the model\"]').focus()")
    browser.press("Home", "Right", "Right", "Right", "Enter")
    assert focused(browser).startswith("Dispatches of the step")
    shown = browser.run("return [...document.querySelectorAll('[id^=run-]')].map((run) => Number(run.id.slice(4)))")
    assert set(range(28, 37)) <= set(shown)
    assert browser.run("return document.querySelector('.active').id") == "run-28"
    assert len(shown) < 14


@pytest.mark.parametrize("width", [340, 700])
def test_narrow_screens_scroll_down_only(page, browser, width):
    browser.open(page, width=width)
    browser.wait("document.querySelectorAll('[role=option]').length > 100")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    open_dispatch(browser, FFN)
    browser.wait("document.querySelector('.code tr')")
    browser.press("Down")
    browser.wait("document.querySelector('.code td.more')")
    assert browser.run("return document.querySelector('.code').scrollWidth") <= width
    assert browser.run("return document.querySelectorAll('.code col').length") == 3  # One column of text.


HOSTILE = (
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "<!--<script>",
    "\"'`{{ 7 * 7 }}${window.broken = 3}&lt;\u2028\\",
)


def test_hostile_names_stay_text(make_capture, browser, tmp_path):
    sites = [
        Site(function=text, site=0, key=text, executable=text, kind=text, op=text, weight=text, layer=1, shape=text)
        for text in HOSTILE
    ]
    sites = [site.model_copy(update={"function": "decode", "site": number}) for number, site in enumerate(sites)]
    zone = ZoneTotal(
        process=0, name=HOSTILE[0], source=HOSTILE[1], count=1, total_ns=5, self_ns=5, min_ns=5, median_ns=5, max_ns=5
    )
    capture = make_capture(sites=sites, durations=lambda _: 9_000, zones=[zone])
    manifest = {"subject": HOSTILE[0], "device": HOSTILE[1], "missing": {HOSTILE[2]: HOSTILE[3]}, "target": HOSTILE[0]}
    capture.manifest = capture.manifest.model_copy(update=manifest)
    histories = {text: [PassChange(text, text, {text: text})] for text in HOSTILE}
    file = tmp_path / "hostile.html"
    file.write_text(capture_page(capture, histories), encoding="utf-8")

    browser.open(file)
    browser.wait("document.querySelectorAll('tbody tr').length === 6")
    for text in HOSTILE:
        open_dispatch(browser, text)
        browser.wait("document.querySelector('.code tr')")
        assert browser.run("return document.querySelector('.code tr').cells[3].textContent") == text.splitlines()[0]
        browser.press("Escape")
        browser.wait("!document.querySelector('dialog[open]')")
    assert browser.run("return window.broken ?? null") is None
    assert browser.run("return [document.scripts.length, document.images.length]") == [2, 0]
    assert browser.logs("browser") == []
    assert browser.requests() == [file.as_uri()]


def test_histories_that_do_not_fit_are_left_out_and_named(make_capture, browser, tmp_path):
    noise = [PassChange("cse", "module", {"function": "\n".join(f"{n * 2654435761 % 2**32:x}" for n in range(9000))})]
    text = capture_page(make_capture(), {FFN: noise, DOWN: HISTORY}, history_bytes=20_000)
    assert len(text) < 400_000
    file = tmp_path / "small.html"
    file.write_text(text, encoding="utf-8")
    browser.open(file)
    browser.wait("document.querySelector('tbody button')")
    open_dispatch(browser, FFN)
    assert "1 pass is left out" in browser.run("return document.querySelector('dialog .empty').textContent")
    browser.press("Escape")
    open_dispatch(browser, DOWN)
    browser.wait("document.querySelector('dialog .code tr')")


def test_capture_without_dispatches_shows_its_zones(make_capture, browser, tmp_path):
    zone = ZoneTotal(
        process=0, name="step", source="a.py:1", count=3, total_ns=9000, self_ns=9000, min_ns=1, median_ns=2, max_ns=3
    )
    file = tmp_path / "zones.html"
    file.write_text(capture_page(make_capture(sites=[], zones=[zone]), {}), encoding="utf-8")
    browser.open(file)
    browser.wait("document.querySelector('[aria-label=Zones] tbody tr')")
    assert "dispatches were not recorded" in browser.run("return document.querySelector('.summary').textContent")
    assert browser.logs("browser") == []


def test_capture_without_calls_is_refused(make_capture: Callable, tmp_path: Path):
    capture = make_capture()
    (capture.folder / "calls.jsonl").write_text("")
    with pytest.raises(CaptureError, match=r"it holds no dispatches: it was not asked for"):
        capture_page(capture, {})
