"""What is measured is really done: every byte is read, every product added; and the module runs on this machine."""

from dataclasses import replace

import numpy as np
import pytest

from llmir_iree.plugins.kernels.peaks import PRODUCTS, peaks_module
from llmir_iree.targets import resolve_target


@pytest.mark.parametrize("vectors", [1, 3, 7, 40, 41])
def test_every_byte_is_read_by_its_workgroup(kernels, vectors):
    share = 7
    workgroups = -(-vectors // share)
    for position in range(0, vectors * 64, 31):
        memory = np.zeros((vectors, 64), np.uint8)
        memory.flat[position] = 1
        seen = np.full(workgroups, -1, np.int32)
        kernels.dispatch("llmir_read_memory", (memory, seen), range(workgroups), lambda w: (vectors, w, share))
        assert seen.tolist() == [int(position // 64 // share == workgroup) for workgroup in range(workgroups)]


def test_every_pair_of_vectors_of_bytes_is_multiplied_in_every_round(kernels):
    shape, rounds = PRODUCTS["bytes"].shape, 5
    rng = np.random.default_rng(0)
    a = rng.integers(0, 16, shape, np.uint8)
    b = rng.integers(-128, 128, shape, np.int8)
    sums = np.full((2, 16), -1, np.int32)
    kernels.dispatch("llmir_multiply_bytes", (a, b, sums), range(2), lambda w: (rounds, w))
    products = np.einsum("ilk,jlk->l", a.reshape(-1, 16, 4).astype(np.int64), b.reshape(-1, 16, 4).astype(np.int64))
    assert sums.tolist() == [(2 * rounds * products).tolist()] * 2


def test_every_pair_of_vectors_of_floats_is_multiplied_in_every_round(kernels):
    shape, rounds = PRODUCTS["floats"].shape, 5
    rng = np.random.default_rng(1)
    a, b = rng.integers(-9, 9, (2, *shape)).astype(np.float32)  # whose sums are exact
    sums = np.full((2, 16), -1, np.float32)
    kernels.dispatch("llmir_multiply_floats", (a, b, sums), range(2), lambda w: (rounds, w))
    assert sums.tolist() == [(rounds * np.einsum("il,jl->l", a, b)).tolist()] * 2


def test_products_are_counted():
    assert PRODUCTS["bytes"].macs_per_round == 2 * 4 * 4 * 64
    assert PRODUCTS["floats"].macs_per_round == 4 * 4 * 16


def test_a_processor_without_kernels_has_no_module():
    flags = ("--iree-llvmcpu-target-cpu=", "--iree-llvmcpu-target-triple=riscv64-linux-gnu")
    target = resolve_target("llvm-cpu")
    assert peaks_module(replace(target, name="riscv", flags=(*target.flags, *flags))) is None
