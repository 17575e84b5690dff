"""Comparisons of captures whose truth is known: noise calls nothing, planted changes are found and told in words."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmir_iree.cli.trace import main
from llmir_iree.tracing.capture import (
    Call,
    Capture,
    CaptureError,
    CaptureManifest,
    DispatchRun,
    MachineInfo,
    Site,
    write_rows,
)
from llmir_iree.tracing.diff import BETWEEN, DiffRow, Grouping, compare_captures

LAYERS = 22
CALLS = 8

# A decode step of TinyLlama's shapes: kind, shape, time of one dispatch in ns.
LAYER = (
    ("norm_quantize", "1x2048", 4_000),
    ("quantized_matmul", "1x2048x2560", 160_000),
    ("paged_attention", "32x64", 30_000),
    ("merge_attention", "2048", 3_000),
    ("quantized_matmul", "1x2048x2048", 130_000),
    ("norm_quantize", "1x2048", 4_000),
    ("gated_matmul", "1x2048x11264", 700_000),
    ("quantized_matmul", "1x5632x2048", 350_000),
)
AROUND = (("gather", "1x2048", 2_000), ("quantized_matmul", "1x2048x32000", 2_000_000), ("argmax", "32000", 30_000))
DOWN = "quantized_matmul 1x5632x2048"
GATED = "gated_matmul 1x2048x11264"


def step() -> list[tuple[Site, int]]:
    """All sites of a call, and their times."""
    dispatches = [(kind, shape, time, n) for n in range(LAYERS) for kind, shape, time in LAYER]
    dispatches += [(kind, shape, time, None) for kind, shape, time in AROUND]
    return [
        (
            Site(
                function="decode",
                site=n,
                key=kind,
                executable=kind,
                kind=kind,
                shape=shape,
                layer=layer,
            ),
            time,
        )
        for n, (kind, shape, time, layer) in enumerate(dispatches)
    ]


@dataclass(frozen=True)
class Recording:
    """How a capture comes about: `changes` are the ratios of what is planted, by kind and shape.

    `machine` is how slow the machine was while each process ran; a side of its own slows down by chance.
    """

    seed: int
    processes: int = 5
    slowness: float = 1.0
    machine: Sequence[float] | None = None
    session: str | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    without: str | None = None
    has_sites: bool = True
    workgroups: tuple[int, int, int] = (32, 1, 1)
    modules: Mapping[str, str] = field(default_factory=lambda: {"decode.vmfb": "0" * 64})
    flags: tuple[str, ...] = ()


Record = Callable[[Recording], Capture]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Writes captures: processes that drift, calls with heavy tails, short dispatches noisier than long ones."""

    def write(recording: Recording) -> Capture:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}.llmtrace"
        folder.mkdir()
        sites = [(site, time) for site, time in step() if name(site) != recording.without]
        times = np.array([time * recording.changes.get(name(site), 1.0) for site, time in sites])
        generator = np.random.default_rng(recording.seed)
        calls, runs = [], []
        for process in range(recording.processes):
            own = np.exp(0.015 * generator.standard_normal())
            slowness = recording.slowness * (own if recording.machine is None else recording.machine[process])
            typical = times * slowness * np.exp((0.003 + 30 / times) * generator.standard_t(4, len(times)))
            for call in range(CALLS):
                tails = 1 + 0.02 * generator.pareto(3, len(times))
                durations = np.rint(typical * tails).astype(int)
                runs += [
                    DispatchRun(
                        process=process,
                        call=call,
                        function="decode",
                        site=site.site,
                        key=site.key,
                        start_ns=0,
                        duration_ns=duration,
                        tile_ns=duration,
                        tiles=32,
                        workgroups=recording.workgroups if name(site) == DOWN else (32, 1, 1),
                    )
                    for (site, _), duration in zip(sites, durations.tolist(), strict=True)
                ]
                wall = int(durations.sum() + 1_500_000 * slowness * (1 + 0.01 * generator.standard_normal()))
                calls.append(Call(process=process, call=call, function="decode", start_ns=0, wall_ns=wall))
        write_rows(folder, Call, calls)
        write_rows(folder, DispatchRun, runs)
        if recording.has_sites:
            write_rows(folder, Site, (site for site, _ in sites))
        return Capture.create(folder, manifest(recording))

    return write


def name(site: Site) -> str:
    return f"{site.kind} {site.shape}"


def manifest(recording: Recording) -> CaptureManifest:
    return CaptureManifest(
        created="2026-01-01T00:00:00Z",
        subject="bundle",
        phase="decode",
        functions=("decode",),
        batch_size=1,
        context=128,
        processes=recording.processes,
        session=recording.session,
        process_ns=tuple((n * 10**10, n * 10**10 + 10**9) for n in range(recording.processes)),
        device="local-task",
        flags=recording.flags,
        versions={"iree-base-compiler": "3.13.0"},
        modules=dict(recording.modules),
        machine=MachineInfo(cpu="a CPU", cores=2),
        sources=("ireeprof",),
    )


def called(rows: Sequence[DiffRow]) -> list[str]:
    return [row.label for row in rows if row.is_called]


def test_ten_pairs_of_the_same_call_no_change(record: Record) -> None:
    """A whole side may be slower by up to 10%, as after another tenant of the machine woke up."""
    quiet = 0
    slowness = np.random.default_rng(0).uniform(0.9, 1.1, 10)
    for pair in range(10):
        a, b = record(Recording(2 * pair)), record(Recording(2 * pair + 1, slowness=float(slowness[pair])))
        [decode] = compare_captures(a, b).functions
        assert decode.change is not None
        quiet += not decode.change.is_called and not called(decode.rows)
    assert quiet >= 9


@pytest.mark.parametrize("slowness", [1.0, 1.06])
@pytest.mark.parametrize("change", [1.03, 1.08, 1.5, 0.9])
def test_a_planted_change_is_found(record: Record, change: float, slowness: float) -> None:
    a, b = record(Recording(1)), record(Recording(2, changes={DOWN: change}, slowness=slowness))
    [decode] = compare_captures(a, b).functions
    label = f"22 x {DOWN}"
    assert called(decode.rows) == [label]
    row = decode.rows[0]
    assert row.label == label
    assert row.change is not None
    assert row.change.low <= change <= row.change.high
    assert row.change.ratio == pytest.approx(change, rel=0.01)
    assert row.delta_ns == pytest.approx(22 * 350_000 * (change - 1), rel=0.25)
    assert decode.change is not None
    assert decode.change.is_called == (abs(change - 1) > 0.05)
    assert decode.drift == pytest.approx(slowness, rel=0.03)


def test_the_summary_names_the_cause_first(record: Record) -> None:
    a = record(Recording(1))
    b = record(Recording(2, changes={DOWN: 1.5, GATED: 1.08}, workgroups=(8, 1, 1)))
    first, *rest = compare_captures(a, b).summary().split("; ")
    assert first.startswith("decode 1")
    assert "% slower: 7" in first
    assert f"% of it in 22 x {DOWN} (workgroups 32x1x1 -> 8x1x1), 2" in first
    assert first.endswith(f"% in 22 x {GATED}")
    assert all("everything moved alike" in text for text in rest)


def test_the_summary_of_no_change(record: Record) -> None:
    sentence = compare_captures(record(Recording(1)), record(Recording(2))).summary()
    assert sentence.startswith("decode: no change of the whole is called, ")
    assert "noise floor" in sentence
    assert "changed:" not in sentence


def test_the_summary_of_a_change_that_drowns_in_the_whole(record: Record) -> None:
    short = "argmax 32000"
    sentence = compare_captures(record(Recording(1)), record(Recording(2, changes={short: 1.2}))).summary()
    assert "no change of the whole is called" in sentence
    assert f"changed: {short} " in sentence


def test_a_slow_machine_is_told(record: Record) -> None:
    [decode] = compare_captures(record(Recording(1)), record(Recording(2, slowness=1.15))).functions
    assert decode.drift == pytest.approx(1.15, abs=0.03)
    assert decode.change is not None
    assert not decode.change.is_called
    assert "everything moved alike and got 1" in decode.summary()


def in_turns(seed: int, slowness: float, changes: Mapping[str, float] = {}, processes: int = 5) -> list[Recording]:
    """Two sides of one session: A B, B A, A B on a machine that others use, whose speed wanders by a fifth."""
    generator = np.random.default_rng(1000 + seed)
    wander = np.exp(np.cumsum(0.03 * generator.standard_normal(2 * processes))).tolist()
    turns = [(n, n + 1) if n % 4 == 0 else (n + 1, n) for n in range(0, 2 * processes, 2)]
    machines = ([wander[turn[side]] for turn in turns] for side in (0, 1))
    of_b = {"changes": changes, "slowness": slowness}
    return [
        Recording(2 * seed + side, processes, machine=machine, session=f"session {seed}", **(of_b if side else {}))
        for side, machine in enumerate(machines)
    ]


def test_ten_pairs_in_turns_call_no_change(record: Record) -> None:
    quiet = 0
    for seed in range(10):
        [decode] = compare_captures(*map(record, in_turns(seed, 1.0))).functions
        assert decode.change is not None
        quiet += not decode.change.is_called and decode.uniform is None and not called(decode.rows)
    assert quiet >= 9


@pytest.mark.parametrize("slowness", [1.1, 0.9, 1.3])
def test_a_uniform_change_is_called_in_turns_only(record: Record, slowness: float) -> None:
    """The machine moves the sides of a pair by 3%, the mean of five by 1.4%: a tenth is 7 times that, 4 are enough."""
    for seed in range(3):
        sides = in_turns(seed, slowness)
        [decode] = compare_captures(*map(record, sides)).functions
        assert decode.change is not None
        assert decode.change.is_called
        assert decode.drift is None
        assert decode.uniform == pytest.approx(slowness, rel=0.04)
        assert decode.change.low <= slowness <= decode.change.high
        assert "most dispatches alike got" in decode.summary()
        [alone] = compare_captures(*(record(replace(side, session=None)) for side in sides)).functions
        assert alone.change is not None
        assert not alone.change.is_called
        assert alone.uniform is None
        assert alone.drift == pytest.approx(slowness, rel=0.04)


def test_a_planted_change_beside_a_uniform_one(record: Record) -> None:
    a, b = map(record, in_turns(1, 1.15, {DOWN: 1.8}))
    diff = compare_captures(a, b)
    [decode] = diff.functions
    assert decode.rows[0].label == f"22 x {DOWN}"
    assert decode.uniform == pytest.approx(1.15, rel=0.04)
    first, last = decode.summary().split(", ")
    assert f"% of it in 22 x {DOWN}" in first
    assert last.startswith("other dispatches alike got 1")
    assert "their processes took turns, 0.0 s apart" in diff.notes[0]


def test_a_planted_change_is_found_in_turns(record: Record) -> None:
    """A drift that pairs do not tell from chance is taken out, so that what is left is as exact as elsewhere."""
    [decode] = compare_captures(*map(record, in_turns(2, 1.0, {DOWN: 1.05}))).functions
    assert called(decode.rows) == [f"22 x {DOWN}"]
    assert decode.uniform is None


def test_a_process_without_its_neighbour_is_left_out(record: Record) -> None:
    """B lost a process at the end; of A the same is left out, although it would have moved the mean."""
    a, b = in_turns(3, 1.0)
    assert a.machine is not None
    a = replace(a, machine=[*a.machine[:4], 9.0])
    [decode] = compare_captures(record(a), record(replace(b, processes=4))).functions
    assert decode.processes == (4, 4)
    assert decode.change is not None
    assert not decode.change.is_called
    [few] = compare_captures(record(a), record(replace(b, processes=2))).functions
    assert "nothing can be called: 2 and 2 processes" in few.summary()


def test_rows_add_up_to_the_call(record: Record) -> None:
    groupings: tuple[Grouping, ...] = ("dispatch", "site", "kind", "layer")
    a, b = record(Recording(1)), record(Recording(2, without="argmax 32000", changes={DOWN: 1.3}))
    for by in groupings:
        [decode] = compare_captures(a, b, by).functions
        assert sum(row.a_ns or 0 for row in decode.rows) == pytest.approx(decode.a_ns)
        assert sum(row.b_ns or 0 for row in decode.rows) == pytest.approx(decode.b_ns)
        assert sum(row.share or 0 for row in decode.rows) == pytest.approx(1)


def test_rows_of_one_side_are_kept(record: Record) -> None:
    whole, part = record(Recording(1)), record(Recording(2, without=GATED))
    for a, b, side in ((whole, part, "a"), (part, whole, "b")):
        [decode] = compare_captures(a, b).functions
        row = decode.rows[0]
        assert (row.label, row.side, row.change) == (f"22 x {GATED}", side, None)
        assert row.share == pytest.approx(1, abs=0.02)
        assert f"in 22 x {GATED} only in {side.upper()}" in decode.summary()


def test_what_replaces_something_is_named_with_it(record: Record) -> None:
    """Neither costs what it alone adds or saves."""
    a, b = record(Recording(1, without=DOWN)), record(Recording(2, without=GATED, changes={DOWN: 3.0}))
    [decode] = compare_captures(a, b).functions
    assert decode.change is not None
    assert decode.change.is_called
    share = sum(row.share or 0 for row in decode.rows if row.side != "both")
    assert 0.5 < share < 1.2
    assert decode.summary().partition(": ")[2] == f"{share:.0%} of it in 22 x {DOWN} in place of 22 x {GATED}"


def test_groupings(record: Record) -> None:
    a, b = record(Recording(1)), record(Recording(2, changes={GATED: 1.5}))
    labels: dict[Grouping, list[str]] = {
        "dispatch": [f"22 x {GATED}"],
        "site": [GATED] * LAYERS,
        "kind": ["22 x gated_matmul"],
        "layer": [f"8 x dispatches of layer {n}" for n in range(LAYERS)],
    }
    for by, expected in labels.items():
        [decode] = compare_captures(a, b, by).functions
        assert sorted(called(decode.rows)) == sorted(expected)
        assert BETWEEN in [row.label for row in decode.rows]


def test_without_sites_keys_and_order_do(record: Record) -> None:
    a, b = record(Recording(1, has_sites=False)), record(Recording(2, has_sites=False, changes={GATED: 1.5}))
    [decode] = compare_captures(a, b).functions
    assert called(decode.rows) == ["22 x gated_matmul"]


@pytest.mark.parametrize(("a", "b"), [(1, 5), (5, 2), (2, 2)])
def test_too_few_processes_call_nothing(record: Record, a: int, b: int) -> None:
    [decode] = compare_captures(record(Recording(1, a)), record(Recording(2, b, changes={DOWN: 5.0}))).functions
    assert decode.change is None
    assert {row.change for row in decode.rows} == {None}
    assert decode.rows[0].label == f"22 x {DOWN}"
    assert f"nothing can be called: {a} and {b} processes, it takes 3 a side" in decode.summary()


def test_notes_tell_what_was_not_alike(record: Record) -> None:
    a, b = record(Recording(1)), record(Recording(2))
    assert compare_captures(a, b).notes == ("both ran the same modules, so that no change comes from the compiler",)
    changed = record(Recording(3, modules={"decode.vmfb": "1" * 64}, flags=("--iree-llvmcpu-target-cpu=generic",)))
    assert compare_captures(a, changed).notes == (
        "flags only in A: none; only in B: --iree-llvmcpu-target-cpu=generic",
    )
    fused = Capture(b.folder, b.manifest.model_copy(update={"passes": ("fold-silu-mul",)}))
    assert "passes of the plugin only in A: none; only in B: fold-silu-mul" in compare_captures(a, fused).notes
    longer = Capture(b.folder, b.manifest.model_copy(update={"context": 512}))
    assert "they were not recorded alike: context 128 and 512" in compare_captures(a, longer).notes


def test_captures_that_cannot_be_compared(record: Record, tmp_path: Path) -> None:
    a, b = record(Recording(1, 1)), record(Recording(2, 1))
    for row in (Call, DispatchRun):
        write_rows(b.folder, row, [value.model_copy(update={"function": "prefill"}) for value in b.read(row)])
    with pytest.raises(CaptureError, match=r"no function is in both captures: .* calls decode, .* calls prefill"):
        compare_captures(a, b)
    write_rows(b.folder, DispatchRun, [])
    with pytest.raises(CaptureError, match="no calls with dispatches in them were recorded"):
        compare_captures(a, b)


def diff(a: Capture, b: Capture, *options: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of llmir-trace diff."""
    result = CliRunner().invoke(main, ["diff", str(a.folder), str(b.folder), *options])
    return result.exit_code, result.stdout, result.stderr


def test_command_shows_the_summary_first(record: Record) -> None:
    code, out, err = diff(record(Recording(1)), record(Recording(2, changes={DOWN: 1.5}, without="argmax 32000")))
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("decode ")
    assert f"in 22 x {DOWN}" in lines[0]
    changed = [line for line in lines if f"* 22 x {DOWN}" in line]
    assert len(changed) == 1
    assert "+5" in changed[0] or "+49" in changed[0]
    assert [line for line in lines if "only A" in line and line.endswith("argmax 32000")]


def test_command_drops_no_row_of_one_side(record: Record) -> None:
    code, out, _ = diff(record(Recording(1)), record(Recording(2, without="argmax 32000")), "--top", "1")
    assert code == 0
    assert "only A" in out
    assert " more" in out


@pytest.mark.parametrize(
    ("options", "code"), [((), 0), (("--fail-if-slower", "5"), 1), (("--fail-if-slower", "40"), 0)]
)
def test_exit_code_for_a_slower_call(record: Record, options: tuple[str, ...], code: int) -> None:
    found, out, err = diff(record(Recording(1)), record(Recording(2, changes={DOWN: 1.8})), *options)
    assert found == code
    assert out.startswith("decode ")
    assert ("slower, more than 5%" in err) == (code == 1)


def test_exit_code_for_a_faster_call_and_for_noise(record: Record) -> None:
    a, fast, same = record(Recording(1)), record(Recording(2, changes={DOWN: 0.5})), record(Recording(3))
    assert diff(a, fast, "--fail-if-slower", "0")[0] == 0
    assert diff(a, same, "--fail-if-slower", "0")[0] == 0


def test_a_gate_that_cannot_tell_does_not_pass(record: Record) -> None:
    code, _, err = diff(record(Recording(1, 2)), record(Recording(2, 2)), "--fail-if-slower", "5")
    assert code == 2
    assert "too few processes to call decode slower or not" in err


def test_command_writes_json(record: Record) -> None:
    code, out, _ = diff(record(Recording(1)), record(Recording(2, changes={DOWN: 1.5})), "--json")
    [function] = json.loads(out)["functions"]
    row = function["rows"][0]
    assert code == 0
    assert row["label"] == f"22 x {DOWN}"
    assert row["change"]["is_called"]
    assert len(row["matches"]) == LAYERS
    assert row["matches"][0] == {
        "basis": "export",
        "a": {"site": 7, "key": "quantized_matmul"},
        "b": {"site": 7, "key": "quantized_matmul"},
    }


@pytest.mark.parametrize("top", ["0", "-3"])
def test_command_shows_at_least_a_row(record: Record, top: str) -> None:
    capture = record(Recording(1))
    code, out, err = diff(capture, capture, "--top", top)
    assert (code, out) == (2, "")
    assert err.endswith(f"error: --top {top}: expected 1 or more\n")


def test_details_stand_below_their_row(record: Record) -> None:
    a, b = record(Recording(1)), record(Recording(2, changes={DOWN: 1.8}, workgroups=(8, 1, 1)))
    code, out, _ = diff(a, b)
    assert code == 0
    lines = out.splitlines()
    row = next(index for index, line in enumerate(lines) if line.endswith(f"* 22 x {DOWN}"))
    assert lines[row + 1].strip() == "workgroups 32x1x1 -> 8x1x1"
    assert lines[row + 1].index("workgroups") == lines[row].index("22 x") + 2


def test_command_refuses_what_is_no_capture(record: Record, tmp_path: Path) -> None:
    capture = record(Recording(1, 1))
    code, _, err = diff(capture, Capture(tmp_path, capture.manifest))
    assert code == 2
    assert "not a capture" in err
    (capture.folder / "dispatches.jsonl").write_text('{"process": 0, "ca')
    assert "dispatches.jsonl, line 1: " in diff(capture, capture)[2]
