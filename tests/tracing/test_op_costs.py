"""Costs of dispatches: kernels from their sizes, the compiler's own from its ops, names where nothing else is known."""

import pytest

from llmir_iree.params.formats import FORMATS
from llmir_iree.plugins.kernels import definitions
from llmir_iree.plugins.kernels.executables import Kernel
from llmir_iree.trace_build import known_kernels
from llmir_iree.tracing.op_costs import KERNEL_KINDS, Step, cost_of, parse_key
from llmir_iree.tracing.stream_sites import Binding, StreamSite


def site(kernel: str, scalars: tuple[int | None, ...], *bindings: Binding) -> StreamSite:
    return StreamSite(f"{kernel}_executable", f"{kernel}_dispatch", (), scalars, bindings, (), None)


def test_every_kernel_has_a_cost() -> None:
    kernels = known_kernels()
    assert {kernel.kind for kernel in kernels.values()} == set(KERNEL_KINDS)
    constants = {value.name for value in vars(definitions).values() if isinstance(value, Kernel)}
    assert {f"{name}_executable" for name in constants} <= set(kernels)


def test_a_matmul_of_open_rows_takes_them_from_the_step() -> None:
    weights = FORMATS["q4_0"].nbytes(2048, 5632)
    read = Binding("read", 0, weights, "model.layers.3.mlp.down_proj.weight.qs")
    codes, result = Binding("read", 1, 5632 * 3, None), Binding("write", 2, 2048 * 4, None)
    twice = site("llmir_quantized_matmul_q4_0", (None, 2048, 5632, 8), read, codes, codes, result)
    cost = cost_of(twice, known_kernels(), Step(2, 32, 0))
    assert (cost.kind, cost.shape) == ("quantized_matmul", "64x2048x5632")
    assert cost.flops == 2 * 64 * 2048 * 5632
    assert cost.bytes_read == weights + 5632 * 3
    assert cost.bytes_written == 2048 * 4
    assert cost_of(twice, known_kernels(), None).flops is None


@pytest.mark.parametrize(("window", "seen"), [(0, 101), (64, 64)])
def test_attention_reads_the_context_and_writes_the_new_token(window: int, seen: int) -> None:
    kernel = known_kernels()["llmir_rope_append_attend_f16_executable"]
    values = dict.fromkeys(kernel.constants, 0) | {"heads": 9, "kv_heads": 3, "head_dim": 64, "window": window}
    cache = Binding("update", 0, 1 << 30, None)
    query, partials = Binding("read", 1, 3840, None), Binding("write", 2, 2376, None)
    attend = site("llmir_rope_append_attend_f16", tuple(values.values()), cache, query, query, partials)
    cost = cost_of(attend, known_kernels(), Step(1, 1, 100))
    token = 2 * 3 * 64 * 2
    assert cost.bytes_read == 3840 + (seen - 1) * token
    assert cost.bytes_written == 2376 + token
    assert cost.flops == 4 * 9 * 64 * seen


def test_a_prefill_attends_to_what_came_before_each_token() -> None:
    assert Step(1, 4, 10).attended(0) == 11 + 12 + 13 + 14
    assert Step(2, 4, 10).attended(12) == 2 * (11 + 12 + 12 + 12)


@pytest.mark.parametrize(
    ("key", "kind", "shape"),
    [
        ("main_dispatch_0_matmul_64x32xD_f32", "matmul", "64x32xD"),
        ("f$async_dispatch_12_batch_matmul_1x1x128x64_f16xf16xf32", "batch_matmul", "1x1x128x64"),
        ("main_dispatch_1_softmax_64x32xf32_dispatch_tensor_store", "softmax", "64x32"),
        ("a_dispatch_1_conv_2d_nhwc_hwcf_1x2x3x4_f32", "conv_2d_nhwc_hwcf", "1x2x3x4"),
        ("f$async_dispatch_3_elementwise_broadcast_576_i32xf32", "elementwise_broadcast", "576"),
        ("f_dispatch_4_slow_memcpy", "slow_memcpy", None),
        ("f_dispatch_5", "other", None),
        ("my_kernel_dispatch", "my_kernel", None),
    ],
)
def test_names_tell_kind_and_shape(key: str, kind: str, shape: str | None) -> None:
    assert parse_key(key) == (kind, shape)
