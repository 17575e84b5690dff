// Tiles of quantised weights times quantised activations: what the kernels that multiply have in common.
//
// Weights stand 16 rows side by side, one to a lane, so that a sum stays in its lane. With x = s * a and weights
// w = d * (c - z) + m, a group of 32 adds s * (d * (dot(c, a) - z * sum(a)) + m * sum(a)): bytes are multiplied with
// bytes, and the rest is a few operations for each row and group. Second records of a group add in the same way, and are
// few.
//
// A few records meet each step of the weights as it is unpacked, and hide behind the weights' way from memory. For
// more, a group of two tiles is unpacked into 16 registers, which then serve up to 32 rows; sums wait in the first
// cache.
#pragma once

#include "weights.h"

// Tiles that share the broadcasts of a record, records that share a tile when there are few and when there are many, and
// sums of one dot product that wait for each other less than one would, as registers allow. Where these hold a group of
// unpacked weights, many records meet it one by one; elsewhere each load of a weight has to serve several.
#if defined(__AVX512F__)
enum { MAX_TILES = 2, RECORDS = 8, MANY = 1, CHAINS = 2 };
#else
enum { MAX_TILES = 1, RECORDS = 4, MANY = 4, CHAINS = 1 };
#endif

// Up to how many records are few: they meet weights as these are unpacked, which for nibbles is cheap enough to be done
// once more instead of keeping them.
enum { MOST_FEW = 8 };
INLINE size_t few(const format f) { return f == Q4_0 || f == Q4_1 || f == Q4_K ? MOST_FEW : RECORDS; }

typedef struct {
  weight_planes planes;
  const activation_group* x;
  size_t rows, columns, groups;
} matmul;

// For each row of a block, and each of two tiles.
typedef f32x16 tile_sums[BLOCK_ROWS][2];

// Whether what the zero point takes from every activation is subtracted from the scaled dot product, in the instruction
// that scales it; otherwise the dot product starts with it, which is for nothing where sums are wide from the start.
INLINE int subtracts_scaled(const format f) {
#if defined(NARROW_SUMS)
  return f == Q4_0;
#else
  (void)f;
  return 0;
#endif
}

// The dot product of one half before its first step.
INLINE dot_sums start_dot(const format f, const activation_group* x, int half) {
  if (!zero_point(f) || subtracts_scaled(f)) return start_sums(splat_i32(0));
  i32x16 start = splat_i32(halves(f) == 2 ? x->low_start : x->start);
  if (half == 1) start = splat_i32(x->start) - start;
  return start_sums(start * (zero_point(f) / -CODE_SUM_FACTOR));
}

// The sum and what a record adds to it once its dot products are known.
INLINE f32x16 add_product(const format f, const weight_group* w, const activation_group* x, const dot_sums* dot,
                          f32x16 sum) {
  if (subtracts_scaled(f)) return sum + w->scale[0] * (f32_from_i32(dot->wide) * x->scale + x->scaled_start);
  f32x16 product = w->scale[0] * f32_from_i32(dot[0].wide);
  if (halves(f) == 2) product += w->scale[1] * f32_from_i32(dot[1].wide);
  if (has_minimum(f)) product += w->minimum * f32_from_i32(splat_i32(x->start));
  return sum + product * x->scale;
}

// One group of `records` records times `tiles` tiles, added to their sums. Groups `index` are unpacked on the way, each
// step just before it is multiplied, unless that is done. A dot product is summed in `chains` parts.
INLINE void multiply_records(const format f, const int tiles, const int records, const int chains, const matmul* m,
                             const size_t* index, const int is_unpacked, weight_group* w, const activation_group* x,
                             f32x16 (*sums)[2]) {
  const int steps = STEPS / halves(f);
  dot_sums dot[RECORDS][MAX_TILES][2];
  UNROLL for (int half = 0; half < halves(f); ++half) {
    UNROLL for (int i = 0; i < records; ++i) UNROLL for (int t = 0; t < tiles; ++t) {
      dot[i][t][half] = start_dot(f, x + i, half);
      if (halves(f) < chains) dot[i][t][1] = start_sums(splat_i32(0));
    }
    UNROLL for (int step = half * steps; step < (half + 1) * steps; ++step) {
      const int part = halves(f) < chains ? step % 2 : half;
      UNROLL for (int t = 0; t < tiles; ++t) if (!is_unpacked) unpack_step(f, &m->planes, index[t], step, &w[t]);
      UNROLL for (int i = 0; i < records; ++i) {
        i8x64 codes = splat_4i8(x[i].codes + 4 * step);
        UNROLL for (int t = 0; t < tiles; ++t) add_codes(f, &dot[i][t][part], step, &w[t], codes);
      }
    }
  }
  UNROLL for (int t = 0; t < tiles; ++t) if (!is_unpacked) unpack_scales(f, &m->planes, index[t], &w[t]);
  UNROLL for (int i = 0; i < records; ++i) UNROLL for (int t = 0; t < tiles; ++t) {
    if (halves(f) < chains) dot[i][t][0].wide += dot[i][t][1].wide;
    sums[i][t] = add_product(f, &w[t], x + i, dot[i][t], sums[i][t]);
  }
}

// Which of some records have second ones, a bit for each.
INLINE uint32_t find_rests(const activation_group* x, const int records) {
  uint32_t found = 0;
  UNROLL for (int i = 0; i < records; ++i) found |= (uint32_t)x[i].has_rest << i;
  return found;
}

// The second records of those of a group that have one, a bit for each in `rests`. Which these are no branch predictor
// foresees: a branch for each record would be missed as often as not, a loop over those that are there is once.
INLINE void multiply_rests(const format f, const int tiles, const matmul* m, const size_t* index, const int is_unpacked,
                           weight_group* w, const activation_group* x, uint32_t rests, f32x16 (*sums)[2]) {
  const activation_group* second = x + rest_distance(m->rows, m->groups);
  for (; rests; rests &= rests - 1) {
    int i = __builtin_ctz(rests);
    multiply_records(f, tiles, 1, CHAINS, m, index, is_unpacked, w, second + i, sums + i);
  }
}

// Up to two tiles: `at_once` of them share broadcasts, the others come one after the other.
typedef struct {
  size_t tile[2], next[2];  // where the weights are, and which come after them
} tile_pair;

INLINE tile_pair pair_tiles(size_t tile, size_t last, size_t next, const int at_once) {
  size_t second = min_size(tile + 1, last);
  return at_once == 2 ? (tile_pair){{tile, second}, {next, next + 1}} : (tile_pair){{tile, second}, {second, next}};
}

// `rows` rows, which are few, times a pair of tiles.
INLINE void multiply_few(const format f, const int rows, const matmul* m, size_t tile, size_t last,
                         size_t next, const activation_group* x, size_t stride, f32x16 (*sums)[2]) {
  // Sums and dot products of 8 rows and two tiles do not fit into 32 registers.
  const int at_once = rows == 1 || rows == MOST_FEW ? 1 : MAX_TILES;
  const tile_pair pair = pair_tiles(tile, last, next, at_once);
  for (int first = 0; first < 2; first += at_once) {
    f32x16 local[MOST_FEW][2], of_rests[MOST_FEW][2];
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int t = 0; t < at_once; ++t)
      local[r][t] = of_rests[r][t] = splat(0.0f);
    const activation_group* record = x;
    for (size_t g = 0; g < m->groups; ++g, record += stride) {
      weight_group w[MAX_TILES];
      size_t index[MAX_TILES];
      UNROLL for (int t = 0; t < at_once; ++t) {
        index[t] = pair.tile[first + t] * m->groups + g;
        prefetch(f, &m->planes, pair.tile[first + t], pair.next[first + t], m->groups, g, rows == 1);
      }
      UNROLL for (int r = 0; r < rows; r += RECORDS) {
        const int records = rows < RECORDS ? rows : RECORDS;
        multiply_records(f, at_once, records, records == 1 ? CHAINS : 1, m, index, 0, w, record + r, local + r);
      }
      multiply_rests(f, at_once, m, index, 0, w, record, find_rests(record, rows), of_rests);
    }
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int t = 0; t < at_once; ++t)
      sums[r][first + t] = local[r][t] + of_rests[r][t];
  }
}

// `rows` rows, up to a block, times a pair of tiles.
INLINE void multiply_many(const format f, const matmul* m, size_t tile, size_t last, size_t next,
                          const activation_group* x, size_t stride, size_t rows, f32x16 (*sums)[2]) {
  const tile_pair pair = pair_tiles(tile, last, next, MAX_TILES);
  for (size_t r = 0; r < rows; ++r) UNROLL for (int t = 0; t < 2; ++t) sums[r][t] = splat(0.0f);
  for (int first = 0; first < 2; first += MAX_TILES) {
    const activation_group* group = x;
    for (size_t g = 0; g < m->groups; ++g, group += stride) {
      weight_group w[MAX_TILES];
      UNROLL for (int t = 0; t < MAX_TILES; ++t) {
        size_t index = pair.tile[first + t] * m->groups + g;
        prefetch(f, &m->planes, pair.tile[first + t], pair.next[first + t], m->groups, g, 0);
        UNROLL for (int step = 0; step < STEPS; ++step) unpack_step(f, &m->planes, index, step, &w[t]);
        unpack_scales(f, &m->planes, index, &w[t]);
      }
      const activation_group* record = group;
      uint32_t rests = 0;
      size_t r = 0;
      for (; r + MANY <= rows; r += MANY, record += MANY) {
        multiply_records(f, MAX_TILES, MANY, CHAINS, m, NULL, 1, w, record, (f32x16(*)[2]) & sums[r][first]);
        rests |= find_rests(record, MANY) << r;
        FINISH_BEFORE_LOADS(record);
      }
      for (; MANY > 1 && r < rows; ++r, ++record) {
        multiply_records(f, MAX_TILES, 1, CHAINS, m, NULL, 1, w, record, (f32x16(*)[2]) & sums[r][first]);
        rests |= find_rests(record, 1) << r;
      }
      multiply_rests(f, MAX_TILES, m, NULL, 1, w, group, rests, (f32x16(*)[2]) & sums[0][first]);
    }
  }
}

// One block of rows, from `row` on, times tiles `tile` and `tile` + 1; a tile behind `last` is not there, and `last`
// stands in for it. `next` is the tile that follows.
INLINE void multiply_block(const format f, const matmul* m, size_t tile, size_t last, size_t next, size_t row,
                           tile_sums sums) {
  size_t rows = min_size(BLOCK_ROWS, m->rows - row), stride;
  const activation_group* x = m->x + activation_index(m->rows, m->groups, row, &stride);
  if (rows > few(f)) {
    multiply_many(f, m, tile, last, next, x, stride, rows, sums);
    return;
  }
#define MULTIPLY_ROWS(n)                                                       \
  if (n <= few(f) && rows - r >= n) {                                          \
    multiply_few(f, n, m, tile, last, next, x + r, stride, sums + r);          \
    r += n;                                                                    \
    continue;                                                                  \
  }
  for (size_t r = 0; r < rows;) {
    MULTIPLY_ROWS(8)
    MULTIPLY_ROWS(4)
    MULTIPLY_ROWS(2)
    MULTIPLY_ROWS(1)
  }
#undef MULTIPLY_ROWS
}
