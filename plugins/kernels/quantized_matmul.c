// y[m, n] = sum over k of x[m, k] * w[n, k], with w in blocks.
//
// Weights are stored as `tile16` (params/layouts.py): 16 rows of w side by side, one to a lane, so that a sum stays in
// its lane. Formats with 32 weights to a scale (q6_k: two times 16) meet activations that were quantised in the same
// groups; plain formats meet float32. A workgroup computes all rows of y for a run of tiles.
//
// A group of two tiles is unpacked into 16 registers, which then serve up to 32 rows of activations. A row costs 8
// broadcasts, 16 dot products of bytes, and for each tile 3 operations that scale and add; sums wait in the first
// cache. The activations carry an excess of 128; what it adds to a dot product, 128 * (sum of the weights), depends on
// the weights alone and is where the sum starts from, negated.
#include "activations.h"
#include "lanes.h"

// Tiles that share the broadcasts of a row.
#if defined(__AVX512F__)
enum { MAX_TILES = 2 };
#else
enum { MAX_TILES = 1 };
#endif

enum { STEPS = 8 };             // of 4 weights each in a group
enum { PREFETCH_GROUPS = 48 };  // how far ahead

typedef enum { Q4_0, Q4_1, Q8_0, Q6_K } format;

// The planes of a matrix; those that a format lacks are null.
typedef struct {
  const f16* d;          // [tiles, blocks, 16]
  const f16* m;          // [tiles, blocks, 16]
  const int8_t* scales;  // [tiles, blocks, 16 sub-blocks, 16]
  const uint8_t* codes;  // [tiles, groups, 4 or 8, 16, 4]: two nibbles or one byte
  const uint8_t* high;   // [tiles, groups, 2, 16, 4]: four times two bits
} weight_planes;

// One group of 32 weights of 16 rows. The halves differ in q6_k only.
typedef struct {
  i8x64 weights[STEPS];
  i32x16 start[2];
  f32x16 scale[2];
  f32x16 minimum;
} weight_group;

INLINE i32x16 excess(i32x16 sum, i8x64 weights) { return dot_u8_i8(sum, splat_u8(128), weights); }

INLINE void unpack_nibbles(const uint8_t* codes, uint8_t zero_point, weight_group* out) {
  i8x64 sum = {0};
  UNROLL for (int i = 0; i < 4; ++i) {
    u8x64 pair = load_u8(codes + 64 * i);
    out->weights[2 * i] = (i8x64)(bits_u8(pair, 0, 15) - splat_u8(zero_point));
    out->weights[2 * i + 1] = (i8x64)(bits_u8(pair, 4, 15) - splat_u8(zero_point));
    sum += out->weights[2 * i] + out->weights[2 * i + 1];  // at most 8 * 15
  }
  out->start[0] = -excess((i32x16){0}, sum);
}

INLINE void unpack_bytes(const uint8_t* codes, weight_group* out) {
  i32x16 sum[2] = {{0}, {0}};
  UNROLL for (int i = 0; i < STEPS; ++i) {
    out->weights[i] = (i8x64)load_u8(codes + 64 * i);
    sum[i % 2] = excess(sum[i % 2], out->weights[i]);
  }
  out->start[0] = -(sum[0] + sum[1]);
}

INLINE void unpack_six_bits(const uint8_t* codes, const uint8_t* high, weight_group* out) {
  UNROLL for (int half = 0; half < 2; ++half) {
    i8x64 sum = {0};
    u8x64 top = load_u8(high + 64 * half);
    UNROLL for (int i = 0; i < 4; ++i) {
      int step = 4 * half + i;
      u8x64 nibble = bits_u8(load_u8(codes + 64 * (step / 2)), 4 * (step % 2), 15);
      u8x64 pair = i < 2 ? (u8x64)((u16x32)top << (4 - 2 * i)) & splat_u8(48) : bits_u8(top, 2 * i - 4, 48);
      out->weights[step] = (i8x64)((nibble | pair) - splat_u8(32));
      sum += out->weights[step];  // at least 4 * -32
    }
    out->start[half] = -excess((i32x16){0}, sum);
  }
}

INLINE void unpack(const format f, const weight_planes* p, size_t tile, size_t groups, size_t g, weight_group* out) {
  size_t index = tile * groups + g;
  if (f == Q4_0) {
    unpack_nibbles(p->codes + index * 256, 8, out);
    out->scale[0] = load_f16(p->d + index * LANES);
  } else if (f == Q4_1) {
    unpack_nibbles(p->codes + index * 256, 0, out);
    out->scale[0] = load_f16(p->d + index * LANES);
    out->minimum = load_f16(p->m + index * LANES);
  } else if (f == Q8_0) {
    unpack_bytes(p->codes + index * 512, out);
    out->scale[0] = load_f16(p->d + index * LANES);
  } else {
    // 8 groups, 16 sub-blocks to a block.
    unpack_six_bits(p->codes + index * 256, p->high + index * 128, out);
    f32x16 d = load_f16(p->d + index / 8 * LANES);
    const int8_t* scales = p->scales + index * 2 * LANES;
    out->scale[0] = d * f32_from_i32(i32_from_i8(*(const i8x16_memory*)scales));
    out->scale[1] = d * f32_from_i32(i32_from_i8(*(const i8x16_memory*)(scales + LANES)));
  }
}

// Weights are met once, or once for every block of rows, and the hardware's own prefetch stops at the end of a page.
// Where a tile ends, the one `tiles` further is next.
INLINE void prefetch(const format f, const weight_planes* p, size_t tile, const int tiles, size_t groups, size_t g) {
  size_t ahead = g + PREFETCH_GROUPS;
  size_t index = (ahead < groups ? tile : tile + (size_t)tiles - 1) * groups + ahead;
  const size_t bytes = f == Q8_0 ? 512 : 256;
  UNROLL for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(p->codes + index * bytes + line);
  if (f == Q6_K) {
    UNROLL for (size_t line = 0; line < 128; line += 64) __builtin_prefetch(p->high + index * 128 + line);
    __builtin_prefetch(p->scales + index * 2 * LANES);
  } else {
    __builtin_prefetch(p->d + index * LANES);
    if (f == Q4_1) __builtin_prefetch(p->m + index * LANES);
  }
}

typedef struct {
  weight_planes planes;
  const activation_group* x;
  float* y;
  size_t rows, columns, groups;
} matmul;

// One group of a row of activations times the same group of `tiles` tiles, added to the tiles' sums.
INLINE void multiply_group(const format f, const int tiles, const weight_group* w, const activation_group* x,
                           f32x16* sum) {
  const int halves = f == Q6_K ? 2 : 1, steps = STEPS / halves;
  UNROLL for (int half = 0; half < halves; ++half) {
    i32x16 dot[MAX_TILES];
    UNROLL for (int t = 0; t < tiles; ++t) dot[t] = w[t].start[half];
    UNROLL for (int step = half * steps; step < (half + 1) * steps; ++step) {
      u8x64 codes = splat_4u8(x->codes + 4 * step);
      UNROLL for (int t = 0; t < tiles; ++t) dot[t] = dot_u8_i8(dot[t], codes, w[t].weights[step]);
    }
    UNROLL for (int t = 0; t < tiles; ++t) sum[t] += f32_from_i32(dot[t]) * (w[t].scale[half] * x->scale);
  }
  if (f == Q4_1) {
    UNROLL for (int t = 0; t < tiles; ++t) sum[t] += w[t].minimum * x->sum;
  }
}

// One row: nothing to amortise, so one tile at a time, in the order of memory.
INLINE void multiply_row(const format f, const matmul* m, size_t tile, size_t row) {
  size_t stride;
  const activation_group* x = m->x + activation_index(m->rows, m->groups, row, &stride);
  f32x16 sum = splat(0.0f);
  for (size_t g = 0; g < m->groups; ++g, x += stride) {
    weight_group w;
    prefetch(f, &m->planes, tile, 1, m->groups, g);
    unpack(f, &m->planes, tile, m->groups, g, &w);
    multiply_group(f, 1, &w, x, &sum);
  }
  store_first_f32(m->y + row * m->columns + tile * LANES, sum, m->columns - tile * LANES);
}

// The rows of one block of activations.
INLINE void multiply_rows(const format f, const int tiles, const matmul* m, size_t tile, size_t row, size_t rows) {
  size_t stride;
  const activation_group* x = m->x + activation_index(m->rows, m->groups, row, &stride);
  f32x16 sums[BLOCK_ROWS][MAX_TILES];
  for (size_t r = 0; r < rows; ++r) UNROLL for (int t = 0; t < tiles; ++t) sums[r][t] = splat(0.0f);

  for (size_t g = 0; g < m->groups; ++g) {
    weight_group w[MAX_TILES];
    UNROLL for (int t = 0; t < tiles; ++t) {
      prefetch(f, &m->planes, tile + (size_t)t, tiles, m->groups, g);
      unpack(f, &m->planes, tile + (size_t)t, m->groups, g, &w[t]);
    }
    for (size_t r = 0; r < rows; ++r, ++x) {
      multiply_group(f, tiles, w, x, sums[r]);
      FINISH_BEFORE_LOADS(x);
    }
  }

  UNROLL for (int t = 0; t < tiles; ++t) {
    size_t column = (tile + (size_t)t) * LANES;
    for (size_t r = 0; r < rows; ++r)
      store_first_f32(m->y + (row + r) * m->columns + column, sums[r][t], m->columns - column);
  }
}

// All rows of y for the workgroup's tiles: blocks of activations outside, so that one block and the tiles' weights, a
// few hundred kilobytes each at most, stay in the second cache.
INLINE void multiply(const format f, const matmul* m, size_t workgroup, size_t tiles_per_workgroup) {
  size_t first = workgroup * tiles_per_workgroup;
  size_t end = min_size(ceil_div(m->columns, LANES), first + tiles_per_workgroup);
  for (size_t row = 0; row < m->rows; row += BLOCK_ROWS) {
    size_t rows = min_size(BLOCK_ROWS, m->rows - row);
    size_t tile = first;
    if (rows == 1) {
      for (; tile < end; ++tile) multiply_row(f, m, tile, row);
    }
    for (; MAX_TILES == 2 && tile + 2 <= end; tile += 2) multiply_rows(f, 2, m, tile, row, rows);
    for (; tile < end; ++tile) multiply_rows(f, 1, m, tile, row, rows);
  }
}

// Arguments of all kernels below.
//   the weights' planes, in the order of the format and in layout tile16
//   x        activations as llmir_quantize_activations writes them
//   y        float32 [rows, columns]
//   rows     of x and y
//   columns  of y: rows of the matrix, before padding to whole tiles
//   depth    columns of x and of the matrix, a whole number of blocks
KERNEL void llmir_quantized_matmul_q4_0(const f16* restrict d, size_t d_offset, const uint8_t* restrict qs,
                                        size_t qs_offset, const uint8_t* restrict x, size_t x_offset, float* restrict y,
                                        size_t y_offset, size_t rows, size_t columns, size_t depth, size_t workgroup,
                                        size_t tiles_per_workgroup) {
  const matmul call = {{.d = d + d_offset, .codes = qs + qs_offset},
                       (const activation_group*)(x + x_offset),
                       y + y_offset,
                       rows,
                       columns,
                       depth / GROUP};
  multiply(Q4_0, &call, workgroup, tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_q4_1(const f16* restrict d, size_t d_offset, const f16* restrict m, size_t m_offset,
                                        const uint8_t* restrict qs, size_t qs_offset, const uint8_t* restrict x,
                                        size_t x_offset, float* restrict y, size_t y_offset, size_t rows,
                                        size_t columns, size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  const matmul call = {{.d = d + d_offset, .m = m + m_offset, .codes = qs + qs_offset},
                       (const activation_group*)(x + x_offset),
                       y + y_offset,
                       rows,
                       columns,
                       depth / GROUP};
  multiply(Q4_1, &call, workgroup, tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_q8_0(const f16* restrict d, size_t d_offset, const int8_t* restrict qs,
                                        size_t qs_offset, const uint8_t* restrict x, size_t x_offset, float* restrict y,
                                        size_t y_offset, size_t rows, size_t columns, size_t depth, size_t workgroup,
                                        size_t tiles_per_workgroup) {
  const matmul call = {{.d = d + d_offset, .codes = (const uint8_t*)(qs + qs_offset)},
                       (const activation_group*)(x + x_offset),
                       y + y_offset,
                       rows,
                       columns,
                       depth / GROUP};
  multiply(Q8_0, &call, workgroup, tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_q6_k(const uint8_t* restrict ql, size_t ql_offset, const uint8_t* restrict qh,
                                        size_t qh_offset, const int8_t* restrict scales, size_t scales_offset,
                                        const f16* restrict d, size_t d_offset, const uint8_t* restrict x,
                                        size_t x_offset, float* restrict y, size_t y_offset, size_t rows,
                                        size_t columns, size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  const matmul call = {
      {.d = d + d_offset, .scales = scales + scales_offset, .codes = ql + ql_offset, .high = qh + qh_offset},
      (const activation_group*)(x + x_offset),
      y + y_offset,
      rows,
      columns,
      depth / GROUP};
  multiply(Q6_K, &call, workgroup, tiles_per_workgroup);
}
