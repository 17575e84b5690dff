"""Perfetto traces, read back with Perfetto's own messages."""

from collections import defaultdict
from pathlib import Path

import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from llmir_iree.tracing.capture import Call, CaptureError, DispatchRun, Site, write_rows
from llmir_iree.tracing.views.perfetto import write_perfetto


def read_trace(file: Path):
    """Names of tracks by uuid, and slices [track, begin, end, name, category, args] in the order of their ends."""
    trace = protos.Trace()
    trace.ParseFromString(file.read_bytes())
    tracks, slices, is_open = {}, [], defaultdict(list)
    for packet in trace.packet:
        if packet.HasField("track_descriptor"):
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor
            continue
        event = packet.track_event
        if event.type == protos.TrackEvent.TYPE_SLICE_BEGIN:
            args = {}
            for note in event.debug_annotations:
                args[note.name] = getattr(note, note.WhichOneof("value"))
            is_open[event.track_uuid].append((packet.timestamp, event.name, list(event.categories), args))
        else:
            begin, *rest = is_open[event.track_uuid].pop()
            slices.append((tracks[event.track_uuid].name, begin, packet.timestamp, *rest))
    assert not any(is_open.values())
    return tracks, slices


def test_trace_holds_every_call_and_dispatch(make_capture, tmp_path):
    capture = make_capture()
    file = tmp_path / "decode.pftrace"
    assert write_perfetto(capture, file) == 10 + 2000
    tracks, slices = read_trace(file)

    assert [track.process.process_name for track in tracks.values() if track.HasField("process")] == [
        "tinyllama, process 0",
        "tinyllama, process 1",
    ]
    assert all(track.parent_uuid in tracks for track in tracks.values() if not track.HasField("process"))
    calls = [slice_ for slice_ in slices if slice_[0] == "calls"]
    assert sorted((begin, end - begin, name) for _, begin, end, name, *_ in calls) == sorted(
        (call.start_ns, call.wall_ns, "decode") for call in capture.read(Call)
    )
    dispatches = [slice_ for slice_ in slices if slice_[0] == "dispatches"]
    assert sorted((begin, end - begin, name) for _, begin, end, name, *_ in dispatches) == sorted(
        (run.start_ns, run.duration_ns, run.key) for run in capture.read(DispatchRun)
    )


def test_dispatch_tells_what_it_is(make_capture, tmp_path):
    capture = make_capture()
    file = tmp_path / "decode.pftrace"
    write_perfetto(capture, file)
    run = next(run for run in capture.read(DispatchRun) if run.site == 2)
    site = next(site for site in capture.read(Site) if site.site == 2)
    _, slices = read_trace(file)
    [(*_, categories, args)] = [slice_ for slice_ in slices if slice_[1] == run.start_ns and slice_[3] == run.key][:1]
    assert categories == ["quantized_matmul"]
    assert args["layer"] == 0
    assert args["weight"] == "blk.0.attn_qkv.weight"
    assert args["bytes_read"] == site.bytes_read
    assert args["flops"] == site.flops
    assert args["workgroups"] == "32x1x1"
    assert args["busy_threads"] == pytest.approx(1.8, abs=0.01)
    assert args["gb_s"] == pytest.approx((site.bytes_read + site.bytes_written) / run.duration_ns, abs=0.001)


def test_dispatches_that_overlap_stand_side_by_side(make_capture, tmp_path):
    capture = make_capture()
    run = capture.read(DispatchRun)[0]
    times = [(0, 100), (50, 100), (100, 10), (120, 10), (149, 1000)]
    runs = [run.model_copy(update={"start_ns": start, "duration_ns": duration}) for start, duration in times]
    write_rows(capture.folder, DispatchRun, runs)
    file = tmp_path / "decode.pftrace"
    write_perfetto(capture, file)
    _, slices = read_trace(file)
    lanes = {(begin, end - begin): track for track, begin, end, *_ in slices if track.startswith("dispatches")}
    assert [lanes[time] for time in times] == [
        "dispatches",
        "dispatches, overlapping 1",
        "dispatches",
        "dispatches",
        "dispatches",
    ]


def test_negative_numbers_and_unwritable_characters_are_encoded(make_capture, tmp_path):
    capture = make_capture()
    [run] = capture.read(DispatchRun)[:1]
    write_rows(capture.folder, DispatchRun, [run.model_copy(update={"site": -3, "key": "é\u2028" * 200})])
    file = tmp_path / "decode.pftrace"
    write_perfetto(capture, file)
    _, slices = read_trace(file)
    [(*_, name, _, args)] = [slice_ for slice_ in slices if slice_[0] == "dispatches"]
    assert name == "é\u2028" * 200
    assert args["site"] == -3


def test_nothing_is_left_behind_where_it_cannot_be_written(make_capture, tmp_path):
    capture = make_capture()
    with pytest.raises(CaptureError, match=r"cannot write .*No such file or directory"):
        write_perfetto(capture, tmp_path / "missing" / "decode.pftrace")
    (tmp_path / "a.pftrace").mkdir()
    with pytest.raises(CaptureError, match="cannot write"):
        write_perfetto(capture, tmp_path / "a.pftrace")
    assert not list(tmp_path.glob(".*"))


def test_capture_without_calls_is_refused(make_capture, tmp_path):
    capture = make_capture()
    write_rows(capture.folder, Call, [])
    with pytest.raises(CaptureError, match=r"holds no calls to write to x\.pftrace"):
        write_perfetto(capture, tmp_path / "x.pftrace")
