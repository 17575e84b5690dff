import numpy as np
import pytest

from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import TILE16, has_tile16, pack_tile16, tile16_shapes, unpack_tile16

TILED = [name for name in FORMATS if has_tile16(name)]


def random_planes(weight_format, rows, columns):
    rng = np.random.default_rng(rows)
    shapes = FORMATS[weight_format].plane_shapes(rows, columns)
    planes = {}
    for plane in FORMATS[weight_format].planes:
        shape = shapes[plane.name]
        planes[plane.name] = rng.integers(0, 256, (*shape, plane.dtype.itemsize), np.uint8).view(plane.dtype)[..., 0]
    return planes


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("weight_format", TILED)
def test_unpacking_undoes_packing(weight_format, rows):
    columns = 3 * max(32, FORMATS[weight_format].block_size)
    planes = random_planes(weight_format, rows, columns)
    tiles = pack_tile16(weight_format, planes)
    assert {name: plane.shape for name, plane in tiles.items()} == tile16_shapes(weight_format, rows, columns)
    back = unpack_tile16(weight_format, tiles, rows)
    assert list(back) == [plane.name for plane in FORMATS[weight_format].planes]
    for name, plane in planes.items():
        assert back[name].dtype == plane.dtype
        assert back[name].tobytes() == plane.tobytes(), name


@pytest.mark.parametrize("weight_format", TILED)
def test_tiles_take_no_more_bytes_than_the_padded_matrix(weight_format):
    columns = 2 * max(32, FORMATS[weight_format].block_size)
    tiles = pack_tile16(weight_format, random_planes(weight_format, 17, columns))
    assert sum(plane.nbytes for plane in tiles.values()) == FORMATS[weight_format].nbytes(32, columns)


def test_rows_that_fill_a_tile_are_zero():
    tiles = pack_tile16("q8_0", random_planes("q8_0", 17, 32))
    assert not tiles["d"][1, :, 1:].any()
    assert not tiles["qs"][1, :, :, 1:].any()


def test_a_byte_of_q4_holds_columns_four_apart():
    planes = random_planes("q4_0", 16, 32)
    qs = planes["qs"][:, 0]
    codes = np.concatenate((qs & 15, qs >> 4), axis=1)
    tiles = pack_tile16("q4_0", planes)["qs"]
    for step, row, k in ((0, 0, 0), (1, 5, 3), (3, 15, 2)):
        assert tiles[0, 0, step, row, k] == codes[row, 8 * step + k] | codes[row, 8 * step + 4 + k] << 4


def test_a_byte_of_q5_k_holds_the_fifth_bits_of_columns_four_apart():
    planes = random_planes("q5_k", 16, 512)
    tiles = pack_tile16("q5_k", planes)
    for block, group, row, k in ((0, 0, 0, 0), (1, 3, 5, 3), (1, 7, 15, 2)):
        fifth_bits = planes["qh"][row, block] >> group & 1
        expected = sum(int(fifth_bits[4 * step + k]) << step for step in range(8))
        assert tiles["qh"][0, 8 * block + group, 0, row, k] == expected
        nibbles = planes["qs"][row, block, 32 * (group // 2) :][:32] >> 4 * (group % 2) & 15
        assert tiles["qs"][0, 8 * block + group, 2, row, k] == nibbles[16 + k] | nibbles[20 + k] << 4
        assert tiles["scales"][0, block, 7, row] == planes["scales"][row, block, 7]


def test_a_format_without_tiles_is_named():
    assert not has_tile16("f32")
    with pytest.raises(ValueError, match="no layout tile16 for format 'f32'; it exists for f16, bf16, q4_0"):
        pack_tile16("f32", {})


def test_the_layout_has_a_version():
    assert (TILE16.name, TILE16.version) == ("tile16", 1)
