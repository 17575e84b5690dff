"""docs/capture-format.md tells every file and every field of a capture, and no other."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from pydantic import BaseModel

from llmir_iree.tracing import capture as schema
from llmir_iree.tracing.capture import (
    SCHEMA_VERSION,
    SOURCES,
    Call,
    Capture,
    CaptureManifest,
    DispatchRun,
    MachineInfo,
    Site,
    ZoneTotal,
)

TEXT = (Path(__file__).parents[2] / "docs" / "capture-format.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#+ (.+)\n((?:(?!^#).*\n)*)", TEXT, flags=re.MULTILINE))

RECORDS: dict[str, type[BaseModel]] = {
    "manifest.json": CaptureManifest,
    "machine": MachineInfo,
    "calls.jsonl": Call,
    "dispatches.jsonl": DispatchRun,
    "sites.jsonl": Site,
    "zones.jsonl": ZoneTotal,
}


@pytest.mark.parametrize("section", RECORDS)
def test_fields_are_those_of_the_record_in_its_order(section: str) -> None:
    told = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", SECTIONS[section], flags=re.MULTILINE)
    fields = RECORDS[section].model_fields
    assert [name for name, _ in told] == list(fields)
    for name, words in told:
        annotation = str(fields[name].annotation)
        is_optional = "None" in annotation and "tuple" not in annotation
        assert words.endswith((", *none*", " or null")) == is_optional, name
        assert (words.split()[0].rstrip(",") == "text") == ("str" in annotation.split("[")[0]), name


def test_every_record_has_a_section() -> None:
    """A class that is added to the schema has to be told as well."""
    records = {
        value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, schema._Record)
    }
    assert records - {schema._Record} == set(RECORDS.values())
    assert set(schema._TABLES.values()) == {name for name in RECORDS if name.endswith(".jsonl")}


def test_the_version_is_told() -> None:
    assert f"This page tells version {SCHEMA_VERSION}," in TEXT
    assert f"| `schema_version` | integer | {SCHEMA_VERSION} |" in TEXT
    assert f"what was captured: {', '.join(f'`{source}`' for source in SOURCES)} |" in TEXT


def test_files_of_a_capture_are_told(small_capture: Capture) -> None:
    trees = re.findall(r"^```\n(NAME\.llmtrace|ir)/\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    told = {name: re.findall(r"^  (\S+?)/? {2,}", lines, flags=re.MULTILINE) for name, lines in trees}
    patterns = [name.replace("-N.", "-[0-9].") for name in told["NAME.llmtrace"]]
    for folder, names in ((small_capture.folder, patterns), (small_capture.ir, told["ir"])):
        found = [file.name for file in folder.iterdir()]
        assert [name for name in found if not any(fnmatch(name, pattern) for pattern in names)] == []
        missing = [pattern for pattern in names if not any(fnmatch(name, pattern) for name in found)]
        assert missing in ([], ["process-[0-9].tracy"])


def test_the_program_of_the_page_runs(
    small_capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.llmtrace").symlink_to(small_capture.folder)
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    exec(compile(program, "capture-format.md", "exec"), {})
    assert capsys.readouterr().out.startswith("('main',) main_dispatch_0_matmul")
