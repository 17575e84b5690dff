// y[m, n] = sum over k of x[m, k] * w[n, k], with w in halves (f16 or bf16) and x in float32.
//
// Weights are stored as `tile16` (params/layouts.py): 16 rows of w side by side, one to a lane, column after column. A
// column is widened once and serves up to 8 rows of x, each of which is broadcast element by element. Few rows keep
// several partial sums each, because one chain of additions would wait for itself.
#include "lanes.h"

#if defined(__AVX512F__)
enum { MAX_ROWS = 8 };
#else
enum { MAX_ROWS = 2 };
#endif

enum { PREFETCH_COLUMNS = 256 };  // how far ahead

typedef enum { F16, BF16 } format;

INLINE f32x16 load_column(const format f, const uint16_t* w) { return f == F16 ? load_f16(w) : load_bf16(w); }

// `rows` rows of x times one tile.
INLINE void multiply_tile(const format f, const int rows, const uint16_t* w, const float* x, size_t depth, float* y,
                          size_t y_stride, size_t columns) {
  enum { MAX_PARTS = 4 };
  const int parts = rows == 1 ? 4 : rows <= 4 ? 2 : 1;
  f32x16 sum[MAX_ROWS][MAX_PARTS];
  UNROLL for (int row = 0; row < rows; ++row) UNROLL for (int part = 0; part < parts; ++part) sum[row][part] =
      splat(0.0f);

  size_t k = 0;
  for (; k + 4 <= depth; k += 4, w += 4 * LANES) {
    __builtin_prefetch(w + PREFETCH_COLUMNS * LANES);
    __builtin_prefetch(w + (PREFETCH_COLUMNS + 2) * LANES);
    UNROLL for (int i = 0; i < 4; ++i) {
      f32x16 column = load_column(f, w + i * LANES);
      UNROLL for (int row = 0; row < rows; ++row) sum[row][i % parts] +=
          column * x[(size_t)row * depth + k + (size_t)i];
    }
  }
  for (; k < depth; ++k, w += LANES) {
    f32x16 column = load_column(f, w);
    UNROLL for (int row = 0; row < rows; ++row) sum[row][0] += column * x[(size_t)row * depth + k];
  }

  UNROLL for (int row = 0; row < rows; ++row) {
    UNROLL for (int part = 1; part < parts; ++part) sum[row][0] += sum[row][part];
    store_first_f32(y + (size_t)row * y_stride, sum[row][0], columns);
  }
}

INLINE void multiply(const format f, const uint16_t* w, const float* x, float* y, size_t rows, size_t columns,
                     size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  size_t first = workgroup * tiles_per_workgroup, end = min_size(ceil_div(columns, LANES), first + tiles_per_workgroup);
  size_t row = 0;
  while (row < rows) {
    size_t left = rows - row;
#define MULTIPLY_ROWS(n)                                                                                               \
  if (n <= MAX_ROWS && left >= n) {                                                                                    \
    for (size_t tile = first; tile < end; ++tile)                                                                      \
      multiply_tile(f, n, w + tile * depth * LANES, x + row * depth, depth, y + row * columns + tile * LANES, columns, \
                    columns - tile * LANES);                                                                           \
    row += n;                                                                                                          \
    continue;                                                                                                          \
  }
    MULTIPLY_ROWS(8)
    MULTIPLY_ROWS(4)
    MULTIPLY_ROWS(2)
    MULTIPLY_ROWS(1)
  }
}

// Arguments of both kernels.
//   w        [tiles, depth, 16], layout tile16
//   x        float32 [rows, depth]
//   y        float32 [rows, columns]
//   columns  of y: rows of the matrix, before padding to whole tiles
KERNEL void llmir_quantized_matmul_f16(const f16* restrict w, size_t w_offset, const float* restrict x, size_t x_offset,
                                       float* restrict y, size_t y_offset, size_t rows, size_t columns, size_t depth,
                                       size_t workgroup, size_t tiles_per_workgroup) {
  multiply(F16, w + w_offset, x + x_offset, y + y_offset, rows, columns, depth, workgroup, tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_bf16(const bf16* restrict w, size_t w_offset, const float* restrict x,
                                        size_t x_offset, float* restrict y, size_t y_offset, size_t rows,
                                        size_t columns, size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  multiply(BF16, w + w_offset, x + x_offset, y + y_offset, rows, columns, depth, workgroup, tiles_per_workgroup);
}
