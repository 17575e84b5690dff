// y[m, n] = sum over k of x[m, k] * w[n, k], with w in halves (f16 or bf16) and x in float32.
//
// Weights are stored as `tile16` (params/layouts.py): 16 rows of w side by side, one to a lane, column after column. A
// column is widened once and serves up to 8 rows of x, each of which is broadcast element by element, once for two
// tiles. Few rows keep several partial sums each, because one chain of additions would wait for itself.
#include "lanes.h"

// Rows and tiles whose sums fit the registers.
#if defined(__AVX512F__)
enum { MAX_ROWS = 8, MAX_TILES = 2 };
#else
enum { MAX_ROWS = 4, MAX_TILES = 1 };
#endif

enum { BLOCK_ROWS = 32 };         // that meet a pair of tiles while it is in the second cache
enum { PREFETCH_COLUMNS = 256 };  // how far ahead

typedef enum { F16, BF16 } format;

typedef struct {
  const uint16_t* w;
  const float* x;
  float* y;
  size_t rows, columns, depth;
} matmul;

INLINE f32x16 load_column(const format f, const uint16_t* w) { return f == F16 ? load_f16(w) : load_bf16(w); }

// `rows` rows of x from `row` on times `tiles` tiles from `tile` on.
INLINE void multiply_tiles(const format f, const int rows, const int tiles, const matmul* m, size_t row, size_t tile) {
  enum { MAX_PARTS = 4 };
  const int parts = rows == 1 ? 4 : rows == 2 ? 2 : 1;
  const uint16_t* w = m->w + tile * m->depth * LANES;
  const float* x = m->x + row * m->depth;
  f32x16 sum[MAX_ROWS][MAX_TILES][MAX_PARTS];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int t = 0; t < tiles; ++t) UNROLL for (int i = 0; i < parts; ++i)
      sum[r][t][i] = splat(0.0f);

  size_t k = 0;
  for (; k + 4 <= m->depth; k += 4, w += 4 * LANES) {
    UNROLL for (int t = 0; t < tiles; ++t) {
      __builtin_prefetch(w + (PREFETCH_COLUMNS + (size_t)t * m->depth) * LANES);
      __builtin_prefetch(w + (PREFETCH_COLUMNS + 2 + (size_t)t * m->depth) * LANES);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
      f32x16 column[MAX_TILES];
      UNROLL for (int t = 0; t < tiles; ++t) column[t] = load_column(f, w + ((size_t)t * m->depth + (size_t)i) * LANES);
      UNROLL for (int r = 0; r < rows; ++r) {
        f32x16 element = splat(x[(size_t)r * m->depth + k + (size_t)i]);
        UNROLL for (int t = 0; t < tiles; ++t) sum[r][t][i % parts] += column[t] * element;
      }
    }
  }
  for (; k < m->depth; ++k, w += LANES) {
    UNROLL for (int t = 0; t < tiles; ++t) {
      f32x16 column = load_column(f, w + (size_t)t * m->depth * LANES);
      UNROLL for (int r = 0; r < rows; ++r) sum[r][t][0] += column * x[(size_t)r * m->depth + k];
    }
  }

  UNROLL for (int t = 0; t < tiles; ++t) {
    size_t column = (tile + (size_t)t) * LANES;
    UNROLL for (int r = 0; r < rows; ++r) {
      UNROLL for (int i = 1; i < parts; ++i) sum[r][t][0] += sum[r][t][i];
      store_first_f32(m->y + (row + (size_t)r) * m->columns + column, sum[r][t][0], m->columns - column);
    }
  }
}

// Rows from `row` to `end` times `tiles` tiles.
INLINE void multiply_rows(const format f, const int tiles, const matmul* m, size_t row, size_t end, size_t tile) {
#define MULTIPLY_ROWS(n)                           \
  if (n <= MAX_ROWS && end - row >= n) {           \
    multiply_tiles(f, n, tiles, m, row, tile);     \
    row += n;                                      \
    continue;                                      \
  }
  while (row < end) {
    MULTIPLY_ROWS(8)
    MULTIPLY_ROWS(4)
    MULTIPLY_ROWS(2)
    MULTIPLY_ROWS(1)
  }
#undef MULTIPLY_ROWS
}

INLINE void multiply(const format f, const matmul* m, size_t workgroup, size_t workgroups) {
  size_t tiles = ceil_div(m->columns, LANES), pairs = ceil_div(tiles, 2);
  size_t first = 2 * first_unit(pairs, workgroup, workgroups);
  size_t end = min_size(tiles, 2 * first_unit(pairs, workgroup + 1, workgroups));
  for (size_t row = 0; row < m->rows; row += BLOCK_ROWS) {
    size_t row_end = min_size(m->rows, row + BLOCK_ROWS), tile = first;
    if (row_end - row > 1) {  // one row gains nothing from shared broadcasts
      for (; tile + MAX_TILES <= end; tile += MAX_TILES) multiply_rows(f, MAX_TILES, m, row, row_end, tile);
    }
    for (; tile < end; ++tile) multiply_rows(f, 1, m, row, row_end, tile);
  }
}

// Arguments of both kernels.
//   w        [tiles, depth, 16], layout tile16
//   x        float32 [rows, depth]
//   y        float32 [rows, columns]
//   columns  of y: rows of the matrix, before padding to whole tiles
KERNEL void llmir_quantized_matmul_f16(const f16* restrict w, size_t w_offset, const float* restrict x, size_t x_offset,
                                       float* restrict y, size_t y_offset, size_t rows, size_t columns, size_t depth,
                                       size_t workgroup, size_t workgroups) {
  const matmul call = {w + w_offset, x + x_offset, y + y_offset, rows, columns, depth};
  multiply(F16, &call, workgroup, workgroups);
}

KERNEL void llmir_quantized_matmul_bf16(const bf16* restrict w, size_t w_offset, const float* restrict x,
                                        size_t x_offset, float* restrict y, size_t y_offset, size_t rows,
                                        size_t columns, size_t depth, size_t workgroup, size_t workgroups) {
  const matmul call = {w + w_offset, x + x_offset, y + y_offset, rows, columns, depth};
  multiply(BF16, &call, workgroup, workgroups);
}
