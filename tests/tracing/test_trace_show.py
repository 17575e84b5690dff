"""llmir-trace show: the same rows as text, JSON and CSV."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmir_iree.cli.trace import main
from llmir_iree.cli.trace_show import Table, draw
from llmir_iree.tracing.capture import MANIFEST_NAME, SCHEMA_VERSION, Capture
from llmir_iree.tracing.table import BETWEEN, GROUPINGS, aggregate, balance


def show(capture: Capture | Path, *arguments: str) -> Result:
    folder = capture.folder if isinstance(capture, Capture) else capture
    return CliRunner().invoke(main, ["show", str(folder), *arguments])


@pytest.mark.parametrize("by", GROUPINGS)
def test_text_has_every_row_and_what_it_adds_up_to(small_capture: Capture, by: str) -> None:
    done = show(small_capture, "--by", by)
    assert done.exit_code == 0, done.output
    assert all(row.name in done.stdout for row in aggregate(small_capture, by))  # type: ignore[arg-type]
    assert "All rows add up to" in done.stdout


def test_text_shows_rates_and_ops(small_capture: Capture) -> None:
    text = show(small_capture).stdout
    assert "linalg.matmul\n" in "\n".join(line.rstrip() + "\n" for line in text.splitlines())
    assert "GFLOP/s" in text


def test_a_narrow_terminal_keeps_what_matters_most(small_capture: Capture) -> None:
    opened = Table(small_capture, aggregate(small_capture), balance(small_capture), "dispatch", False)
    titles = {width: [column.header for column in draw(opened, width).columns] for width in (60, 100, 400)}
    assert titles[60][-1] == "share"
    assert len(titles[60]) < len(titles[100]) < len(titles[400])
    assert "workgroups" in titles[400]


@pytest.mark.timed
def test_json_holds_all_fields(small_capture: Capture) -> None:
    data = json.loads(show(small_capture, "--json").stdout)
    assert data["by"] == "dispatch"
    assert data["rows"][-1]["name"] == BETWEEN
    assert sum(row["share"] for row in data["rows"]) == pytest.approx(1, abs=0.001)
    assert abs(data["balance"]["difference"]) < 0.03


def test_csv_holds_the_same(small_capture: Capture) -> None:
    rows = list(csv.DictReader(io.StringIO(show(small_capture, "--csv", "--by", "site").stdout)))
    assert [row["name"].split()[0] for row in rows] == ["0", "1", "between"]
    assert rows[0]["flops"] == str(float(2 * 256 * 768 * 512))
    assert rows[0]["workgroups"].count("x") == 2


def test_top_and_filter(small_capture: Capture) -> None:
    assert "between" in show(small_capture, "--top", "1").stdout
    filtered = show(small_capture, "--filter", "*softmax*").stdout
    assert "of the step" in filtered
    assert "matmul" not in filtered.replace(str(small_capture.folder), "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--filter", "sofmax"), "no row matches 'sofmax'; nearest:"),
        (("--sort", "speed"), "cannot sort by 'speed'"),
        (("--top", "0"), "--top 0"),
        (("--json", "--csv"), "choose one"),
    ],
)
def test_wrong_options_are_told_in_one_line(small_capture: Capture, arguments: tuple[str, ...], told: str) -> None:
    done = show(small_capture, *arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_newer_capture_is_refused(small_capture: Capture, tmp_path: Path) -> None:
    manifest = json.loads((small_capture.folder / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**manifest, "schema_version": SCHEMA_VERSION + 1}))
    done = show(tmp_path)
    assert done.exit_code == 2
    assert f"its schema is {SCHEMA_VERSION + 1}" in done.stderr


@pytest.mark.parametrize("table", [MANIFEST_NAME, "calls.jsonl", "dispatches.jsonl"])
def test_bytes_that_are_no_text_are_refused(small_capture: Capture, tmp_path: Path, table: str) -> None:
    folder = shutil.copytree(small_capture.folder, tmp_path / "damaged.llmtrace")
    (folder / table).write_bytes(b"\xff\xfe\x00 no text")
    done = show(folder)
    assert done.exit_code == 2
    assert table in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_capture_of_the_first_schema_is_read(small_capture: Capture, tmp_path: Path) -> None:
    folder = shutil.copytree(small_capture.folder, tmp_path / "old.llmtrace")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    added = {"session", "process_ns"}
    old = {**{name: value for name, value in manifest.items() if name not in added}, "schema_version": 1}
    (folder / MANIFEST_NAME).write_text(json.dumps(old))
    assert show(folder).exit_code == 0
    assert Capture.open(folder).manifest.session is None


def test_a_folder_that_is_no_capture_is_refused(tmp_path: Path) -> None:
    done = show(tmp_path)
    assert done.exit_code == 2
    assert "not a capture" in done.stderr
