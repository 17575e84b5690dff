// y[m, n] = sum over k of x[m, k] * w[n, k], with w in blocks.
//
// Weights are stored as `tile16` (params/layouts.py): 16 rows of w side by side, one to a lane, so that a sum stays in
// its lane. Formats with 32 weights to a scale (q6_k: two times 16) meet activations that were quantised in the same
// groups; plain formats meet float32. A workgroup computes all rows of y for a run of tiles.
//
// One group of a tile is unpacked into 8 registers, which then serve up to 16 rows of activations: a row costs 8 byte
// dot products and 3 operations to scale them. The activations carry an excess of 128; what it adds to a dot product,
// 128 * (sum of the weights), depends on the weights alone and is where the sum starts from, negated.
#include "activations.h"
#include "lanes.h"

// Rows that share one unpacking. 16 sums, 8 registers of weights, and what scales them fill 32 registers.
#if defined(__AVX512F__)
enum { MAX_ROWS = 16 };
#else
enum { MAX_ROWS = 4 };
#endif

enum { STEPS = 8 };             // of 4 weights each in a group
#ifndef PFG
#define PFG 48
#endif
enum { PREFETCH_GROUPS = PFG };  // how far ahead

typedef enum { Q4_0, Q4_1, Q8_0, Q6_K } format;

// The planes of a matrix; those that a format lacks are null.
typedef struct {
  const f16 *d;           // [tiles, blocks, 16]
  const f16 *m;           // [tiles, blocks, 16]
  const int8_t *scales;   // [tiles, blocks, 16 sub-blocks, 16]
  const uint8_t *codes;   // [tiles, groups, 4 or 8, 16, 4]: two nibbles or one byte
  const uint8_t *high;    // [tiles, groups, 2, 16, 4]: four times two bits
} weight_planes;

// One group of 32 weights of 16 rows. The halves differ in q6_k only.
typedef struct {
  i8x64 weights[STEPS];
  i32x16 start[2];
  f32x16 scale[2];
  f32x16 minimum;
} weight_group;

INLINE i32x16 excess(i32x16 sum, i8x64 weights) { return dot_u8_i8(sum, splat_u8(128), weights); }

INLINE void unpack_nibbles(const uint8_t *codes, uint8_t zero_point, weight_group *out) {
  i8x64 sum = {0};
  UNROLL for (int i = 0; i < 4; ++i) {
    u8x64 pair = load_u8(codes + 64 * i);
    out->weights[2 * i] = (i8x64)(bits_u8(pair, 0, 15) - splat_u8(zero_point));
    out->weights[2 * i + 1] = (i8x64)(bits_u8(pair, 4, 15) - splat_u8(zero_point));
    sum += out->weights[2 * i] + out->weights[2 * i + 1];  // at most 8 * 15
  }
  out->start[0] = -excess((i32x16){0}, sum);
}

INLINE void unpack_bytes(const uint8_t *codes, weight_group *out) {
  i32x16 sum[2] = {{0}, {0}};
  UNROLL for (int i = 0; i < STEPS; ++i) {
    out->weights[i] = (i8x64)load_u8(codes + 64 * i);
    sum[i % 2] = excess(sum[i % 2], out->weights[i]);
  }
  out->start[0] = -(sum[0] + sum[1]);
}

INLINE void unpack_six_bits(const uint8_t *codes, const uint8_t *high, weight_group *out) {
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

INLINE void unpack(const format f, const weight_planes *p, size_t tile, size_t groups, size_t g, weight_group *out) {
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
    const int8_t *scales = p->scales + index * 2 * LANES;
    out->scale[0] = d * f32_from_i32(i32_from_i8(*(const i8x16_memory *)scales));
    out->scale[1] = d * f32_from_i32(i32_from_i8(*(const i8x16_memory *)(scales + LANES)));
  }
}

// Weights are met once, or once for every block of rows, and the hardware's own prefetch stops at the end of a page.
INLINE void prefetch(const format f, const weight_planes *p, size_t index) {
  const size_t bytes = f == Q8_0 ? 512 : 256, ahead = PREFETCH_GROUPS;
  UNROLL for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(p->codes + (index + ahead) * bytes + line);
  if (f == Q6_K) {
    UNROLL for (size_t line = 0; line < 128; line += 64) __builtin_prefetch(p->high + (index + ahead) * 128 + line);
    __builtin_prefetch(p->scales + (index + ahead) * 2 * LANES);
  } else {
    __builtin_prefetch(p->d + (index + ahead) * LANES);
    if (f == Q4_1) __builtin_prefetch(p->m + (index + ahead) * LANES);
  }
}

// `rows` rows of a block of activations times one tile.
INLINE void multiply_tile(const format f, const int rows, const weight_planes *p, size_t tile, size_t groups,
                          const activation_group *x, size_t x_stride, float *y, size_t y_stride, size_t columns) {
  f32x16 sum[MAX_ROWS];
  UNROLL for (int row = 0; row < rows; ++row) sum[row] = splat(0.0f);
  for (size_t g = 0; g < groups; ++g, x += x_stride) {
    weight_group w;
    unpack(f, p, tile, groups, g, &w);
    prefetch(f, p, tile * groups + g);
    UNROLL for (int row = 0; row < rows; ++row) {
      const int halves = f == Q6_K ? 2 : 1;
      UNROLL for (int half = 0; half < halves; ++half) {
        i32x16 dot = w.start[half];
        UNROLL for (int step = half * 4; step < STEPS - (halves - 1 - half) * 4; ++step)
          dot = dot_u8_i8(dot, splat_4u8(x[row].codes + 4 * step), w.weights[step]);
        sum[row] += f32_from_i32(dot) * (w.scale[half] * x[row].scale);
      }
      if (f == Q4_1) sum[row] += w.minimum * x[row].sum;
      COMPLETE_BEFORE_LOADS(sum[row], x);
    }
  }
  UNROLL for (int row = 0; row < rows; ++row) store_first_f32(y + row * y_stride, sum[row], columns);
}

// All rows of y for the workgroup's tiles: blocks of activations outside, so that one block stays in the first cache
// while the tiles' weights, a few hundred kilobytes at most, stay in the second.
INLINE void multiply(const format f, const weight_planes *p, const activation_group *x, float *y, size_t rows,
                     size_t columns, size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  size_t groups = depth / GROUP;
  size_t first = workgroup * tiles_per_workgroup, end = min_size(ceil_div(columns, LANES), first + tiles_per_workgroup);
  for (size_t block = 0; block < rows; block += BLOCK_ROWS) {
    size_t block_rows = min_size(BLOCK_ROWS, rows - block);
    for (size_t tile = first; tile < end; ++tile) {
      size_t row = 0;
      while (row < block_rows) {
        size_t left = block_rows - row;
        const activation_group *x_row = x + block * groups + row;
        float *y_row = y + (block + row) * columns + tile * LANES;
#define MULTIPLY_ROWS(n)                                                                                      \
  if (n <= MAX_ROWS && left >= n) {                                                                           \
    multiply_tile(f, n, p, tile, groups, x_row, block_rows, y_row, columns, columns - tile * LANES);          \
    row += n;                                                                                                 \
    continue;                                                                                                 \
  }
        MULTIPLY_ROWS(16)
        MULTIPLY_ROWS(8)
        MULTIPLY_ROWS(7)
        MULTIPLY_ROWS(6)
        MULTIPLY_ROWS(5)
        MULTIPLY_ROWS(4)
        MULTIPLY_ROWS(3)
        MULTIPLY_ROWS(2)
        MULTIPLY_ROWS(1)
      }
    }
  }
}

// Arguments of all kernels below.
//   the weights' planes, in the order of the format and in layout tile16
//   x        activations as llmir_quantize_activations writes them
//   y        float32 [rows, columns]
//   rows     of x and y
//   columns  of y: rows of the matrix, before padding to whole tiles
//   depth    columns of x and of the matrix, a whole number of blocks
KERNEL void llmir_quantized_matmul_q4_0(const f16 *restrict d, size_t d_offset, const uint8_t *restrict qs,
                                        size_t qs_offset, const uint8_t *restrict x, size_t x_offset, float *restrict y,
                                        size_t y_offset, size_t rows, size_t columns, size_t depth, size_t workgroup,
                                        size_t tiles_per_workgroup) {
  weight_planes planes = {.d = d + d_offset, .codes = qs + qs_offset};
  multiply(Q4_0, &planes, (const activation_group *)(x + x_offset), y + y_offset, rows, columns, depth, workgroup,
           tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_q4_1(const f16 *restrict d, size_t d_offset, const f16 *restrict m, size_t m_offset,
                                        const uint8_t *restrict qs, size_t qs_offset, const uint8_t *restrict x,
                                        size_t x_offset, float *restrict y, size_t y_offset, size_t rows,
                                        size_t columns, size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  weight_planes planes = {.d = d + d_offset, .m = m + m_offset, .codes = qs + qs_offset};
  multiply(Q4_1, &planes, (const activation_group *)(x + x_offset), y + y_offset, rows, columns, depth, workgroup,
           tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_q8_0(const f16 *restrict d, size_t d_offset, const int8_t *restrict qs,
                                        size_t qs_offset, const uint8_t *restrict x, size_t x_offset, float *restrict y,
                                        size_t y_offset, size_t rows, size_t columns, size_t depth, size_t workgroup,
                                        size_t tiles_per_workgroup) {
  weight_planes planes = {.d = d + d_offset, .codes = (const uint8_t *)(qs + qs_offset)};
  multiply(Q8_0, &planes, (const activation_group *)(x + x_offset), y + y_offset, rows, columns, depth, workgroup,
           tiles_per_workgroup);
}

KERNEL void llmir_quantized_matmul_q6_k(const uint8_t *restrict ql, size_t ql_offset, const uint8_t *restrict qh,
                                        size_t qh_offset, const int8_t *restrict scales, size_t scales_offset,
                                        const f16 *restrict d, size_t d_offset, const uint8_t *restrict x,
                                        size_t x_offset, float *restrict y, size_t y_offset, size_t rows,
                                        size_t columns, size_t depth, size_t workgroup, size_t tiles_per_workgroup) {
  weight_planes planes = {
      .d = d + d_offset, .scales = scales + scales_offset, .codes = ql + ql_offset, .high = qh + qh_offset};
  multiply(Q6_K, &planes, (const activation_group *)(x + x_offset), y + y_offset, rows, columns, depth, workgroup,
           tiles_per_workgroup);
}
