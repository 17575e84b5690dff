// y[m, n] = sum over k of x[m, k] * w[n, k], with w in blocks and x in quantised activations.
#include "products.h"

// All rows of y for the workgroup's tiles: blocks of activations outside, so that one block and the tiles' weights, a
// few hundred kilobytes each at most, stay in the second cache.
INLINE void multiply(const format f, const matmul* m, float* y, size_t first, size_t end) {
  for (size_t row = 0; row < m->rows; row += BLOCK_ROWS) {
    size_t rows = min_size(BLOCK_ROWS, m->rows - row);
    for (size_t tile = first; tile < end; tile += 2) {
      tile_sums sums;
      multiply_block(f, m, tile, end - 1, tile + 2, row, sums);
      for (size_t t = 0; t < min_size(2, end - tile); ++t) {
        size_t column = (tile + t) * LANES;
        for (size_t r = 0; r < rows; ++r)
          store_first_f32(y + (row + r) * m->columns + column, sums[r][t], m->columns - column);
      }
    }
  }
}

// Arguments of all kernels.
//   the weights' planes, in the order of the format and in layout tile16
//   x        quantised activations [rows, depth], see activations.h
//   y        float32 [rows, columns]
//   columns  of y: rows of the matrix, before padding to whole tiles
//   depth    columns of x and of the matrix, a whole number of blocks
#define DEFINE_KERNEL(name, FORMAT)                                                                                 \
  KERNEL void llmir_quantized_matmul_##name(FORMAT##_ARGUMENTS, const uint8_t* restrict x, size_t x_offset,         \
                                            float* restrict y, size_t y_offset, size_t rows, size_t columns,        \
                                            size_t depth, size_t workgroup, size_t workgroups) {                    \
    const matmul call = {FORMAT##_PLANES, (const activation_group*)(x + x_offset), rows, columns, depth / GROUP};   \
    size_t tiles = ceil_div(columns, LANES), pairs = ceil_div(tiles, 2);                                            \
    size_t first = 2 * first_unit(pairs, workgroup, workgroups);                                                    \
    size_t end = min_size(tiles, 2 * first_unit(pairs, workgroup + 1, workgroups));                                 \
    multiply(FORMAT, &call, y + y_offset, first, end);                                                              \
  }

DEFINE_KERNEL(q4_0, Q4_0)
DEFINE_KERNEL(q4_1, Q4_1)
DEFINE_KERNEL(q8_0, Q8_0)
DEFINE_KERNEL(q4_k, Q4_K)
DEFINE_KERNEL(q5_k, Q5_K)
DEFINE_KERNEL(q6_k, Q6_K)
