from __future__ import annotations

import contextlib
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmir_iree.params import SourceError, open_checkpoint
from llmir_iree.params.sources.gguf_header import read_header

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value):
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def field(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name="w", dims=(32, 2), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(fields=(), tensors=(), data=b"", version=3, counts=None):
    count_tensors, count_fields = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, count_tensors, count_fields) + b"".join((*fields, *tensors))
    return head + bytes(-len(head) % 32) + data


def refusal(content):
    started = time.perf_counter()
    with pytest.raises(SourceError) as caught:
        read_header(memoryview(content), "model.gguf")
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    assert message.startswith("model.gguf is ")
    assert "\n" not in message
    return message


def test_values_of_every_type():
    fields = [
        field("u32", U32, struct.pack("<I", 7)),
        field("f32", F32, struct.pack("<f", 0.5)),
        field("bool", BOOL, b"\1"),
        field("text", STRING, text("héllo")),
        field("u64s", ARRAY, struct.pack("<IQ2Q", U64, 2, 1, 1 << 63)),
        field("bools", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\1"),
        field("texts", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("")),
        field("nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + 2 * (struct.pack("<IQ", U8, 2) + b"\1\2")),
    ]
    header = read_header(memoryview(build(fields)), "model.gguf")
    assert header.metadata == {
        "u32": 7,
        "f32": 0.5,
        "bool": True,
        "text": "héllo",
        "u64s": [1, 1 << 63],
        "bools": [False, True, True],
        "texts": ["a", ""],
        "nested": [[1, 2], [1, 2]],
    }


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_placed(version):
    content = build((), [tensor(), tensor("v", (32,), 8, 256)], bytes(300), version)
    header = read_header(memoryview(content), "model.gguf")
    assert header.tensors["w"].shape == (2, 32)
    assert header.tensors["w"].nbytes == 256
    assert header.tensors["v"].encoding == "q8_0"
    assert header.tensors["v"].row_bytes == header.tensors["v"].nbytes == 34
    assert header.tensors["v"].offset - header.tensors["w"].offset == 256


def test_alignment_of_the_file_is_obeyed():
    fields = [field("general.alignment", U32, struct.pack("<I", 128))]
    content = build(fields, [tensor()], bytes(600))
    assert read_header(memoryview(content), "model.gguf").tensors["w"].offset == 128


@pytest.mark.parametrize("kind", [U8, U64, STRING, ARRAY])
def test_array_of_2_to_the_63_elements_is_refused_at_once(kind):
    content = build([field("a", ARRAY, struct.pack("<IQ", kind, 1 << 63))])
    assert "a has 9223372036854775808 elements" in refusal(content)
    assert "bytes are left" in refusal(content)


def test_nested_arrays_are_bounded():
    payload = b""
    for _ in range(5000):
        payload = struct.pack("<IQ", ARRAY, 1) + payload
    assert "nests arrays more than 4 deep" in refusal(build([field("a", ARRAY, payload)]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no GGUF file: it begins with b'', not b'GGUF'"),
        (b"GGML" + bytes(40), "is no GGUF file: it begins with b'GGML'"),
        (b"GGUF", "the version needs 4 bytes, 0 are left"),
        (build(version=1), "is GGUF version 1; readable are little-endian versions 2 and 3"),
        (build(version=3 << 24), "is a big-endian GGUF file"),
        (build(counts=(1 << 60, 0)), "the tensor table has 1152921504606846976 elements"),
        (build(counts=(0, 1 << 60)), "the metadata has 1152921504606846976 elements"),
        (build([field("a", 13, bytes(8))]), "metadata field a has the unknown type 13"),
        (build([field("a", ARRAY, struct.pack("<IQ", 99, 0))]), "elements of the unknown type 99"),
        (build([field("a", STRING, struct.pack("<Q", 1 << 62))]), "a needs 4611686018427387904 bytes"),
        (build([field("a", U8, b"\0")] * 2), "metadata field a occurs twice"),
        (build([field("a", STRING, text(b"\xff\xfe"))]), "a is not UTF-8"),
        (build([field("a", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 40))]), "element 0 of a ends at byte"),
        (build([field("general.alignment", U32, struct.pack("<I", 48))]), "general.alignment is 48, not a power of"),
        (build([field("general.alignment", U32, bytes(4))]), "general.alignment is 0, not a power of two"),
        (build([field("general.alignment", STRING, text("x"))]), "general.alignment is 'x', not a power of two"),
        (build((), [tensor(dims=())], bytes(99)), "tensor w has 0 dimensions, valid are 1 to 4"),
        (build((), [tensor(dims=(1,) * 5)], bytes(99)), "tensor w has 5 dimensions"),
        (build((), [tensor(dims=(32, 0))], bytes(99)), r"tensor w has shape [0, 32]"),
        (build((), [tensor(dims=(1 << 32, 1 << 32))], bytes(99)), "18446744073709551616 elements of at most 2^63 - 1"),
        (build((), [tensor(kind=31)], bytes(99)), "tensor w has the unknown type 31"),
        (build((), [tensor(dims=(31, 2), kind=8)], bytes(99)), "rows of 31 in Q8_0, whose blocks hold 32"),
        (build((), [tensor(offset=8)], bytes(999)), "tensor w has the offset 8, the alignment is 32"),
        (build((), [tensor(offset=1 << 40)], bytes(999)), "ends at byte 1099511628128, the file at 1095"),
        (build((), [tensor()], bytes(255)), "tensor w ends at byte 352, the file at 351"),
        (build((), [tensor()] * 2, bytes(999)), "tensor w occurs twice"),
        (build((), [tensor()], bytes(999))[:60], "the offset of tensor w needs 8 bytes, 3 are left"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named(content, message):
    assert message in refusal(content)


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(data, gguf_spec, make_gguf, tmp_path):
    if not (tmp_path / "tiny.gguf").exists():
        gguf_spec.tokens = [f"token {number}" for number in range(48)]
        make_gguf(gguf_spec)
        (tmp_path / "whole.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    content = bytearray((tmp_path / "whole.gguf").read_bytes())
    head = content.index(b"blk.1.ffn_down.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, head))] = data.draw(st.integers(0, 255))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(SourceError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            with np.errstate(all="ignore"), contextlib.suppress(SourceError):
                checkpoint.read(name).max()
