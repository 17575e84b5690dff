// Tiles of quantised weights times quantised activations: what the kernels that multiply have in common.
//
// Weights stand 16 rows side by side, one to a lane, so that a sum stays in its lane. With x = s * a + o and weights
// w = d * (c - z) + m, a group of 32 adds s * d * (dot(c, a) - z * sum(a)) + s * m * sum(a) + o * sum(w): bytes are
// multiplied with bytes, and the rest is a few operations for each row and group. The terms of an activation count as
// so many records.
//
// A few records keep their sums in registers, and hide behind the weights' way from memory. For more, a group of two
// tiles is unpacked into 16 registers, which then serve up to 32 rows; sums wait in the first cache.
#pragma once

#include "weights.h"

// Registers for the tiles that share the broadcasts of a row, and for the records that share a tile.
#if defined(__AVX512F__)
enum { MAX_TILES = 2, FEW = 8 };
#else
enum { MAX_TILES = 1, FEW = 2 };
#endif

typedef struct {
  weight_planes planes;
  const activation_group* x;
  size_t rows, columns, groups;
} matmul;

// For each row of a block, and each of two tiles.
typedef f32x16 tile_sums[BLOCK_ROWS][2];

// The dot product of one half before its first step: what the zero point takes from every activation.
INLINE i32x16 start_dot(const format f, const activation_group* x, int half) {
  int32_t sum = halves(f) == 2 ? x->code_sums[half] : x->code_sums[0] + x->code_sums[1];
  return splat_i32(-zero_point(f) * sum);
}

INLINE f32x16 add_product(const format f, const weight_group* w, const activation_group* x, const int term,
                          const i32x16* dot, f32x16 sum) {
  f32x16 product = w->scale[0] * f32_from_i32(dot[0]);
  if (halves(f) == 2) product += w->scale[1] * f32_from_i32(dot[1]);
  if (has_minimum(f)) product += w->minimum * (float)(x->code_sums[0] + x->code_sums[1]);
  sum += product * x->scale;
  return term == 0 ? sum + w->sum * x->offset : sum;
}

// `rows` rows, at most FEW records, times one tile.
INLINE void multiply_few(const format f, const int rows, const int terms, const matmul* m, size_t tile, size_t next,
                         const activation_group* x, size_t stride, f32x16* sums, size_t sums_stride) {
  f32x16 sum[FEW];
  UNROLL for (int r = 0; r < rows; ++r) sum[r] = splat(0.0f);
  for (size_t g = 0; g < m->groups; ++g, x += stride) {
    weight_group w;
    i32x16 dot[FEW][2];
    prefetch(f, &m->planes, tile, next, m->groups, g);
    unpack(f, &m->planes, tile, m->groups, g, &w);
    UNROLL for (int half = 0; half < halves(f); ++half) {
      const int steps = STEPS / halves(f);
      UNROLL for (int i = 0; i < rows * terms; ++i) dot[i][half] = start_dot(f, x + i, half);
      UNROLL for (int step = half * steps; step < (half + 1) * steps; ++step)
          UNROLL for (int i = 0; i < rows * terms; ++i) dot[i][half] =
              dot_codes(f, dot[i][half], w.codes[step], splat_4i8(x[i].codes + 4 * step));
    }
    UNROLL for (int i = 0; i < rows * terms; ++i) sum[i / terms] =
        add_product(f, &w, x + i, i % terms, dot[i], sum[i / terms]);
  }
  UNROLL for (int r = 0; r < rows; ++r) sums[(size_t)r * sums_stride] = sum[r];
}

// One record times MAX_TILES tiles, added to their sums.
INLINE void multiply_record(const format f, const weight_group* w, const activation_group* x, const int term,
                            f32x16* sum) {
  const int steps = STEPS / halves(f);
  i32x16 dot[MAX_TILES][2];
  UNROLL for (int half = 0; half < halves(f); ++half) {
    UNROLL for (int t = 0; t < MAX_TILES; ++t) dot[t][half] = start_dot(f, x, half);
    UNROLL for (int step = half * steps; step < (half + 1) * steps; ++step) {
      i8x64 codes = splat_4i8(x->codes + 4 * step);
      UNROLL for (int t = 0; t < MAX_TILES; ++t) dot[t][half] = dot_codes(f, dot[t][half], w[t].codes[step], codes);
    }
  }
  UNROLL for (int t = 0; t < MAX_TILES; ++t) sum[t] = add_product(f, &w[t], x, term, dot[t], sum[t]);
}

// `rows` rows, up to a block, times MAX_TILES tiles; of these, the ones behind `last` are `last` again.
INLINE void multiply_many(const format f, const int terms, const matmul* m, size_t tile, size_t last, size_t next,
                          const activation_group* x, size_t stride, size_t rows, tile_sums sums) {
  for (size_t r = 0; r < rows; ++r) UNROLL for (int t = 0; t < MAX_TILES; ++t) sums[r][t] = splat(0.0f);
  for (size_t g = 0; g < m->groups; ++g, x += stride) {
    weight_group w[MAX_TILES];
    UNROLL for (int t = 0; t < MAX_TILES; ++t) {
      size_t here = min_size(tile + (size_t)t, last);
      prefetch(f, &m->planes, here, next + (size_t)t, m->groups, g);
      unpack(f, &m->planes, here, m->groups, g, &w[t]);
    }
    const activation_group* record = x;
    for (size_t r = 0; r < rows; ++r) {
      UNROLL for (int term = 0; term < terms; ++term, ++record) {
        multiply_record(f, w, record, term, sums[r]);
        FINISH_BEFORE_LOADS(record);
      }
    }
  }
}

// One block of rows, from `row` on, times tiles `tile` and `tile` + 1; a tile behind `last` is not there. `next` is the
// tile that follows.
INLINE void multiply_block(const format f, const int terms, const matmul* m, size_t tile, size_t last, size_t next,
                           size_t row, tile_sums sums) {
  size_t rows = min_size(BLOCK_ROWS, m->rows - row), stride;
  const activation_group* x = m->x + activation_index(m->rows, m->groups, (size_t)terms, row, &stride);
  size_t tiles = min_size(2, last + 1 - tile);
  if (rows * (size_t)terms > FEW) {
    for (size_t t = 0; t < tiles; t += MAX_TILES)
      multiply_many(f, terms, m, tile + t, last, next, x, stride, rows, (f32x16(*)[2]) & sums[0][t]);
    return;
  }
  for (size_t t = 0; t < tiles; ++t) {
    size_t follows = t + 1 < tiles ? tile + 1 : next, r = 0;
#define MULTIPLY_ROWS(n)                                                                                       \
  if (n * terms <= FEW && rows - r >= n) {                                                                     \
    multiply_few(f, n, terms, m, tile + t, follows, x + r * (size_t)terms, stride, &sums[r][t], 2);            \
    r += n;                                                                                                    \
    continue;                                                                                                  \
  }
    while (r < rows) {
      MULTIPLY_ROWS(8)
      MULTIPLY_ROWS(4)
      MULTIPLY_ROWS(2)
      MULTIPLY_ROWS(1)
    }
#undef MULTIPLY_ROWS
  }
}
