"""The options of llmir-trace that make views."""

import pytest
from click.testing import CliRunner

from llmir_iree.cli.trace import main
from llmir_iree.tracing.capture import PASSES_NAME
from llmir_iree.tracing.ir_dump import pack_tree
from llmir_iree.tracing.views.capture_page import HISTORY_BYTES


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="llmir-trace")

    return invoke


def test_show_writes_page_and_trace_instead_of_the_table(run, make_capture, tmp_path):
    page, trace = tmp_path / "a.html", tmp_path / "a.pftrace"
    result = run("show", make_capture().folder, "--html", page, "--perfetto", trace)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert page.stat().st_size < 5e6 - HISTORY_BYTES  # What is left for histories, packed, is theirs.
    assert trace.stat().st_size > 100_000
    assert result.stderr.splitlines() == [
        f"{page}: {page.stat().st_size / 1e6:.1f} MB, opens in a browser",
        f"{trace}: 2010 calls and dispatches, opens in ui.perfetto.dev",
    ]


def test_show_takes_the_passes_from_the_capture(run, make_capture, tmp_path):
    capture = make_capture()
    key = "decode$async_dispatch_4_paged_attention_1x32x64_i8xi8xf32"
    folder = tmp_path / "tree/builtin_module_module/hal_executable_decode$async_dispatch_4"
    folder.mkdir(parents=True)
    variant = "hal.executable private @decode$async_dispatch_4 {{\n  hal.executable.variant public @v target(<>) {{\n"
    variant += (
        "    hal.executable.export public @{key} ordinal(0)\n    builtin.module {{\n      func.func @{key}() {{\n"
    )
    variant += "        {op}\n        return\n      }}\n    }}\n  }}\n}}\n"
    for number, op in enumerate(("a.one", "a.two")):
        text = f"// -----// IR Dump After Pass: pass-{number} //----- //\n" + variant.format(key=key, op=op)
        (folder / f"1_{number}_pass-{number}.mlir").write_text(text)
    capture.ir.mkdir()
    pack_tree(tmp_path / "tree", capture.ir / PASSES_NAME)
    page = tmp_path / "a.html"
    assert run("show", capture.folder, "--html", page).exit_code == 0
    assert '"pass":"pass-1"' in page.read_text(encoding="utf-8")


def test_flame_is_plain_where_it_is_piped(run, make_capture):
    result = run("show", make_capture().folder, "--flame")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["decode", "36.7"]
    assert lines[1].lstrip().startswith("layers 0-21")
    assert max(map(len, lines)) <= 120


def test_formats_of_stdout_exclude_each_other(run, make_capture):
    result = run("show", make_capture().folder, "--flame", "--csv")
    assert result.exit_code == 2
    assert result.stderr == "llmir-trace: error: --csv and --flame: choose one\n"


def test_view_that_cannot_be_written_ends_in_a_line(run, make_capture, tmp_path):
    result = run("show", make_capture().folder, "--html", tmp_path / "missing" / "a.html")
    assert result.exit_code == 2
    assert result.stderr == f"llmir-trace: error: cannot write {tmp_path}/missing/a.html: No such file or directory\n"


def test_diff_writes_a_page_beside_its_text(run, make_capture, tmp_path):
    manifest = make_capture(name="template").manifest.model_copy(update={"processes": 4})
    a, b = (make_capture(manifest, name=name).folder for name in ("a", "b"))
    page = tmp_path / "diff.html"
    result = run("diff", a, b, "--html", page)
    assert result.exit_code == 0, result.output
    assert "no change" in result.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
