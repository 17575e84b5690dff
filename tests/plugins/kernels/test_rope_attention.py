"""Kernels that rotate, append and attend, against the ops' references on heads that were rotated before."""

import ml_dtypes
import numpy as np
import pytest
import torch
from iree import runtime
from iree.compiler.tools import compile_str

from llmir_iree.export import ops
from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.kernels import build, definitions
from llmir_iree.plugins.kernels import objects as objects_module
from llmir_iree.targets import resolve_target

ABSENT = -(2**31)
LAYER, LAYERS = 1, 2
SCALE = 0.125
TARGET = resolve_target("llvm-cpu")


def scene(starts, seq, heads=6, kv_heads=2, head_dim=64, page_size=16, dtype=np.float16, lengths=None):
    """Rows that hold `start` positions and bring `seq` new tokens, of which the last `length` are no padding.

    Queries, keys and values stand in one matrix. What is not stored is NaN, entries that are not used name no page.
    """
    rng = np.random.default_rng(seq + sum(starts))
    batch = len(starts)
    lengths = lengths or [seq] * batch
    used = [-(-(start + length) // page_size) for start, length in zip(starts, lengths, strict=True)]
    table = np.full((batch, max(used) + 2), ABSENT, np.int32)
    order = rng.permutation(sum(used)).astype(np.int32) + 1
    cache = np.full((sum(used) + 1, LAYERS, 2, kv_heads, page_size, head_dim), np.nan, dtype)
    positions = np.full((batch, seq), -1, np.int32)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        table[row, : used[row]], order = order[: used[row]], order[used[row] :]
        for position in range(start):
            page = cache[table[row, position // page_size], LAYER]
            page[:, :, position % page_size] = rng.standard_normal((2, kv_heads, head_dim))
        positions[row, seq - length :] = np.arange(start, start + length)
    qkv = rng.standard_normal((batch, seq, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    angles = rng.uniform(-3, 3, (batch, seq, head_dim // 2))
    rotation = [np.concatenate([f(angles)] * 2, axis=-1).astype(np.float32) for f in (np.cos, np.sin)]
    return qkv, cache, table, positions, rotation


def rotate(heads, rotation):
    """As transformers does, heads [batch, seq, heads, head_dim]."""
    cos, sin = (angles[:, :, None] for angles in rotation)
    low, high = np.split(heads, 2, axis=-1)
    return heads * cos + np.concatenate([-high, low], axis=-1) * sin


def split_heads(qkv, cache):
    batch, seq, columns = qkv.shape
    kv_heads, head_dim = cache.shape[3], cache.shape[5]
    heads = columns // head_dim - 2 * kv_heads
    return np.split(qkv.reshape(batch, seq, -1, head_dim), [heads, heads + kv_heads], axis=2)


def append(qkv, cache, table, positions, rotation):
    """The cache in float32 as the reference leaves it, rounded to its elements."""
    _, key, value = split_heads(qkv, cache)
    dtype = torch.float16 if cache.dtype == np.float16 else torch.bfloat16
    tensors = [torch.from_numpy(array) for array in (rotate(key, rotation), value, table, positions)]
    return ops.append_kv(torch.from_numpy(cache.astype(np.float32)).to(dtype), *tensors, LAYER).float().numpy()


def attend(qkv, cache, table, positions, rotation, window=0, softcap=0.0):
    query, _, _ = split_heads(qkv, cache)
    present = np.where(table == ABSENT, 0, table)
    tensors = [torch.from_numpy(array) for array in (rotate(query, rotation), cache, present, positions)]
    return ops.paged_attention(*tensors, LAYER, SCALE, window, softcap)[0].numpy()


def check_cache(cache, expected):
    """Equal but for rotated keys that fall on the other side of a tie."""
    step = 2**-10 if cache.dtype == np.float16 else 2**-7
    np.testing.assert_allclose(cache.astype(np.float32), expected, rtol=step, atol=1e-6)
    np.testing.assert_array_equal(cache[:, :, 1].astype(np.float32), expected[:, :, 1])
    untouched = np.isnan(expected)
    assert (cache.astype(np.float32)[~untouched] == expected[~untouched]).mean() > 0.99


def check_prefill(kernels, shape, window=0, softcap=0.0):
    qkv, cache, table, positions, rotation = shape
    stored = append(qkv, cache, table, positions, rotation)
    kernels.rope_append(cache, qkv, table, positions, rotation, LAYER)
    check_cache(cache, stored)
    output = kernels.rope_attend(qkv, cache, table, positions, rotation, LAYER, SCALE, window, softcap)
    expected = attend(qkv, cache.astype(np.float32), table, positions, rotation, window, softcap)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def check_decode(kernels, shape, splits=2, window=0, softcap=0.0):
    qkv, cache, table, positions, rotation = shape
    stored = append(qkv, cache, table, positions, rotation)
    before = cache.copy()
    outputs = []
    for order in (1, -1):  # no workgroup may depend on what another one stores
        cache[:] = before
        partials = kernels.rope_append_attend(
            cache, qkv, table, positions, rotation, LAYER, SCALE, window, softcap, splits, order
        )
        assert np.isfinite(partials).all()
        outputs.append(kernels.merge(partials))
    check_cache(cache, stored)
    expected = attend(qkv, cache.astype(np.float32), table, positions, rotation, window, softcap)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(*outputs)


@pytest.fixture(params=[np.float16, ml_dtypes.bfloat16])
def dtype(request):
    return np.dtype(request.param)


@pytest.mark.parametrize("seq", [1, 2, 7, 33])
@pytest.mark.parametrize("start", [0, 15, 40])
def test_prefill(kernels, dtype, start, seq):
    check_prefill(kernels, scene([start], seq, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1), (40, 1)])
@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 16), (80, 32), (128, 32), (256, 5)])
def test_prefill_of_heads(kernels, heads, kv_heads, head_dim, page_size):
    check_prefill(kernels, scene([9], 11, heads, kv_heads, head_dim, page_size))


@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (9, 0.0), (0, 3.0), (20, 3.0)])
def test_prefill_with_window_and_softcap(kernels, window, softcap):
    check_prefill(kernels, scene([30, 2], 19), window, softcap)


def test_prefill_of_ragged_rows(kernels, dtype):
    check_prefill(kernels, scene([5, 0, 16], 9, lengths=[9, 0, 1], dtype=dtype))


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 100])
def test_decode(kernels, dtype, start, splits):
    check_decode(kernels, scene([start], 1, dtype=dtype), splits)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (8, 1), (12, 1), (40, 1)])
@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 16), (80, 32), (128, 32), (256, 5)])
def test_decode_of_heads(kernels, heads, kv_heads, head_dim, page_size):
    check_decode(kernels, scene([75, 3], 1, heads, kv_heads, head_dim, page_size), splits=3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (9, 0.0), (33, 0.0), (0, 3.0), (20, 3.0)])
def test_decode_with_window_and_softcap(kernels, window, softcap, splits):
    check_decode(kernels, scene([70, 8], 1), splits, window, softcap)


def test_idle_rows_give_zeros_and_store_nothing(kernels, dtype):
    shape = scene([40, 0, 7], 1, lengths=[1, 0, 1], dtype=dtype)
    check_decode(kernels, shape, splits=3)
    qkv, cache, table, positions, rotation = shape
    before = cache.tobytes()
    positions[:] = -1
    partials = kernels.rope_append_attend(cache, qkv, table, positions, rotation, LAYER, SCALE, splits=2)
    assert not kernels.merge(partials).any()
    assert cache.tobytes() == before


def test_splits_beyond_a_window_are_not_read(kernels):
    qkv, cache, table, positions, rotation = scene([90], 1)
    cache[table[0, :4], LAYER] = np.nan  # up to position 63; 81 and on are seen
    partials = kernels.rope_append_attend(cache, qkv, table, positions, rotation, LAYER, SCALE, window=10, splits=4)
    assert np.isfinite(partials).all()


def test_separate_queries_keys_and_values(kernels):
    """Three matrices, each with a stride and a first column of its own, give what one gives."""
    qkv, cache, table, positions, rotation = scene([20, 3], 1)
    joint = cache.copy()
    expected = kernels.rope_append_attend(joint, qkv, table, positions, rotation, LAYER, SCALE)
    _, _, _, kv_heads, page_size, head_dim = cache.shape
    rows = [
        np.pad(heads.reshape(2, -1), ((0, 0), (first, 3)))
        for first, heads in zip((5, 0, 7), split_heads(qkv, cache), strict=True)
    ]
    partials = np.full_like(expected, np.nan)
    sizes = (6, kv_heads, head_dim, page_size, table.shape[1], LAYERS, LAYER)
    places = (rows[0].shape[1], 5, rows[1].shape[1], 0, rows[2].shape[1], 7)
    kernels.dispatch(
        "llmir_rope_append_attend_f16",
        (cache, *rows, table, positions, *rotation, partials),
        np.ndindex(1, kv_heads, 2),
        lambda w: (*sizes, *places, 0, SCALE, 0.0, 1, *w),
    )
    np.testing.assert_array_equal(partials, expected)
    assert cache.tobytes() == joint.tobytes()


@pytest.mark.parametrize("columns", [32, 64, 96, 512])
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_merge_weighs_splits_by_their_maxima(kernels, splits, columns):
    rng = np.random.default_rng(splits)
    batch, heads, head_dim = 2, 6, 80
    partials = rng.standard_normal((batch, heads, splits, head_dim + 2)).astype(np.float32) * 3
    partials[..., -1] = np.abs(partials[..., -1]) + 0.1
    partials[1, :, 1:] = [*[0.0] * head_dim, -1e30, 0.0]  # splits that saw nothing
    weights = np.exp(partials[..., -2] - partials[..., -2].max(axis=-1, keepdims=True)).astype(np.float64)
    sums = (weights[..., None] * partials[..., :-2]).sum(axis=2)
    expected = sums / (weights * partials[..., -1]).sum(axis=2)[..., None]
    np.testing.assert_allclose(kernels.merge(partials, columns)[:, 0], expected, rtol=2e-6, atol=1e-6)


def test_merge_of_one_split_divides_and_no_more(kernels):
    partials = np.random.default_rng(0).standard_normal((1, 3, 1, 66)).astype(np.float32)
    partials[..., -2:] = [-1e20, 1.5]
    np.testing.assert_array_equal(kernels.merge(partials)[:, 0], partials[:, :, 0, :-2] / np.float32(1.5))


HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 6, 2, 32, 16
KEY_FIRST, VALUE_FIRST = HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM


def calls(seq, element):
    """The three ops on a batch of two, whose queries, keys and values stand in one tensor."""
    qkv = TensorType((2, seq, (HEADS + 2 * KV_HEADS) * HEAD_DIM), "f32")
    cache = TensorType((None, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM), element)
    table, positions = TensorType((2, None), "i32"), TensorType((2, seq), "i32")
    angles, output = TensorType((2, seq, HEAD_DIM), "f32"), TensorType((2, seq, HEADS * HEAD_DIM), "f32")
    layer, heads, kv_heads = ("layer", LAYER), ("heads", HEADS), ("kv_heads", KV_HEADS)
    q, k, v = ("q_first", 0), ("k_first", KEY_FIRST), ("v_first", VALUE_FIRST)
    scores = ("scale", SCALE), ("window", 40), ("softcap", 0.0)
    rest = (table, positions, angles, angles)
    append_attend = (cache, qkv, qkv, qkv, *rest), (output, cache), (layer, heads, kv_heads, q, k, v, *scores)
    append = (cache, qkv, qkv, *rest), (cache,), (layer, kv_heads, k, v)
    attend = (qkv, cache, *rest), (output, cache), (layer, heads, q, *scores)
    return (
        LlmirCall("rope_append_attend", *append_attend),
        LlmirCall("rope_append", *append),
        LlmirCall("rope_attend", *attend),
    )


def module_of(element):
    """A module of two functions: `decode` and `prefill`, from cache, qkv, table, positions and angles."""
    fused, append, attend = calls(1, element)[0], *calls(None, element)[1:]
    functions = {
        **definitions.rope_append_attend(fused, TARGET),
        **definitions.rope_append(append, TARGET),
        **definitions.rope_attend(attend, TARGET),
    }

    def signature(name, operands, results):
        names = ("cache", "qkv", "table", "positions", "cosines", "sines")
        arguments = ", ".join(f"%{name}: {operand}" for name, operand in zip(names, operands, strict=True))
        return f"util.func public @{name}({arguments}) -> ({', '.join(map(str, results))}) {{"

    def call(llmir_call, operands):
        types = ", ".join(map(str, llmir_call.operands))
        results = ", ".join(map(str, llmir_call.results))
        return f"util.call @{llmir_call.symbol}({operands}, %layer) : ({types}, index) -> ({results})"

    rest = "%table, %positions, %cosines, %sines"
    cache, qkv = fused.operands[:2]
    return (
        "\n".join(functions.values())
        + f"""
{signature("decode", (cache, qkv, *fused.operands[4:]), fused.results)}
  %layer = arith.constant {LAYER} : index
  %result:2 = {call(fused, f"%cache, %qkv, %qkv, %qkv, {rest}")}
  util.return %result#0, %result#1 : {fused.results[0]}, {cache}
}}
{signature("prefill", (cache, attend.operands[0], *attend.operands[2:]), attend.results)}
  %layer = arith.constant {LAYER} : index
  %appended = {call(append, f"%cache, %qkv, %qkv, {rest}")}
  %result:2 = {call(attend, f"%qkv, %appended, {rest}")}
  util.return %result#0, %result#1 : {attend.results[0]}, {cache}
}}"""
    )


def test_compiled_module_prefills_and_decodes(runnable_objects, dtype, monkeypatch):
    monkeypatch.setattr(objects_module, "PACKAGED", runnable_objects.parent)
    monkeypatch.setattr(definitions, "find_variants", lambda _: [build.VARIANTS[runnable_objects.name]])
    binary = compile_str(
        module_of({"float16": "f16", "bfloat16": "bf16"}[dtype.name]), input_type="none", extra_args=TARGET.flags
    )
    config = runtime.Config("local-task")
    module = runtime.load_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary), config)
    for function, starts, seq in (
        (module.prefill, [0, 7], 9),
        (module.decode, [9, 300], 1),
        (module.decode, [5000, 0], 1),  # more positions than splits would like
    ):
        qkv, cache, table, positions, rotation = scene(starts, seq, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, dtype)
        stored = append(qkv, cache, table, positions, rotation)
        output, updated = function(cache, qkv, table, positions, *rotation)
        check_cache(updated.to_host(), stored)
        expected = attend(qkv, updated.to_host().astype(np.float32), table, positions, rotation, window=40)
        np.testing.assert_allclose(output.to_host(), expected.reshape(2, seq, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("element", "head_dim", "accepted"),
    [("f16", 64, True), ("bf16", 256, True), ("f32", 64, False), ("f16", 65, False), ("f16", 512, False)],
)
def test_kernels_accept_what_they_are_written_for(element, head_dim, accepted):
    for call in calls(1, element):
        operands = [
            TensorType((*operand.shape[:-1], head_dim), operand.element) if len(operand.shape) == 6 else operand
            for operand in call.operands
        ]
        assert (
            definitions.accepts_rope(LlmirCall(call.op, tuple(operands), call.results, call.constants), TARGET)
            == accepted
        )
