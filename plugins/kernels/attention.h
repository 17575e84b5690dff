// Causal attention of a block of queries over what a paged cache holds: softmax(scale * q k) v, page by page.
//
// A query here is one head of one token. Queries that share a key head (the group's heads of successive tokens) are
// taken together, so that a key is widened once for all. They stand side by side in the lanes of one or two vectors. A
// query has `share` lanes, of which lane s holds its elements s, s + share, s + 2 share and so on; what meets the lanes
// is `share` consecutive elements of a key, repeated over the vector. Its share is one lane if there are many queries,
// and all 16 if there is one, so that no lane idles.
//
// Values meet weights in the same way if each query has one lane. If it has more, a value's elements take the lanes,
// and meet one weight after the other: the sums of few queries fit the registers so, and a value is widened on its way.
//
// The softmax is online: a running maximum, sum and weighted value for each query, rescaled when the maximum moves.
#pragma once

#include "cache.h"
#include "rotary.h"

// Sums that a pass over keys or values keeps in registers.
#if defined(__AVX512F__)
enum { SUMS = 16 };
#elif defined(__AVX2__) || defined(__aarch64__)
enum { SUMS = 4 };
#else
enum { SUMS = 2 };
#endif

enum {
  MAX_VECTORS = 2,
  MAX_QUERIES = MAX_VECTORS * LANES,
  MAX_POSITIONS = 32,  // that are taken in together
  MOST_VALUES = 4,     // vectors of a value that meet the weights together
  PADDING = 16,  // elements between rows of widened keys, which would otherwise all start in the same cache bank
};

#define LOWEST (-1e30f)  // stands for a score that is not seen; finite, for LOWEST - LOWEST must be 0

typedef struct {
  cache_element element;
  const uint16_t* cache;
  cache_shape shape;
  heads_of_tokens queries;
  rotation rotation;
  size_t layer, window;
  float scale, softcap;
  int is_partial;  // the output is what `merge_attention` takes
} attention;

// One query: its token and head, where its output goes, and the positions that it sees, both included; none where
// last < first.
typedef struct {
  size_t token, head;
  float* output;
  int32_t first, last;
} query;

// Queries that share a key head, and what they see.
typedef struct {
  query queries[MAX_QUERIES];
  size_t count;
  int32_t begin, end;            // first and one past the last that any query sees
  int32_t full_begin, full_end;  // what every query sees that sees anything
} query_block;

INLINE void clear_block(query_block* block) {
  block->count = 0;
  block->begin = block->full_end = INT32_MAX;
  block->end = block->full_begin = 0;
}

// Adds a query at a position; one with a negative position sees nothing.
INLINE void add_query(const attention* a, query_block* block, size_t token, size_t head, int32_t position,
                      float* output) {
  query* q = &block->queries[block->count++];
  *q = (query){token, head, output, 0, position};
  if (position < 0) return;
  q->first = a->window && (size_t)position >= a->window ? position + 1 - (int32_t)a->window : 0;
  block->begin = q->first < block->begin ? q->first : block->begin;
  block->end = position + 1 > block->end ? position + 1 : block->end;
  block->full_begin = q->first > block->full_begin ? q->first : block->full_begin;
  block->full_end = position + 1 < block->full_end ? position + 1 : block->full_end;
}

// What a block of queries carries from position to position. A vector of lanes is 16 floats.
typedef struct {
  float* queries;                                // [steps, vectors, lanes], scaled
  float* sums;                                   // the weighted values: like queries or, of few, [query, element]
  float* wide;                                   // [positions, stride]: keys, then values
  float* products;                               // [positions, vectors, lanes]: parts of scores, then weights
  i32x16 first[MAX_VECTORS], last[MAX_VECTORS];  // positions that a lane's query sees
  f32x16 maximum[MAX_VECTORS];                   // highest score so far, of the lane's query
  f32x16 total[MAX_VECTORS];                     // sum of the weights of positions that fell to the lane
} attention_state;

// How a specialisation is laid out; all of it is constant.
typedef struct {
  int vectors, share;
  size_t stride, positions;  // of the widened rows
} layout;

typedef float f32x2_memory __attribute__((vector_size(8), aligned(4), may_alias));
typedef float f32x4_memory __attribute__((vector_size(16), aligned(4), may_alias));
typedef float f32x8_memory __attribute__((vector_size(32), aligned(4), may_alias));

// Two floats, repeated. Loaded as an integer they take none of the units that multiply, where loaded as floats they do
// on Zen 4; left alone, the compiler loads what is multiplied as floats.
INLINE f32x16 repeat_pair(const float* p) {
#if defined(__AVX512F__)
  f32x16 repeated;
  __asm__("vpbroadcastq %1, %0" : "=v"(repeated) : "m"(*(const f32x2_memory*)p));
  return repeated;
#else
  f32x2_memory x = *(const f32x2_memory*)p;
  return __builtin_shufflevector(x, x, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1);
#endif
}

// `share` floats, repeated.
INLINE f32x16 repeat(const int share, const float* p) {
  if (share == 1) return splat(*p);
  if (share == 2) return repeat_pair(p);
  if (share == 4) {
    f32x4_memory x = *(const f32x4_memory*)p;
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  }
  if (share == 8) {
    f32x8_memory x = *(const f32x8_memory*)p;
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  return load_f32(p);
}

// The lanes of two vectors whose number has the bit `distance` clear, or set, side by side in such groups.
INLINE f32x16 low_halves(const int distance, f32x16 a, f32x16 b) {
  if (distance == 8) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  if (distance == 4) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  if (distance == 2) return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
}

INLINE f32x16 high_halves(const int distance, f32x16 a, f32x16 b) {
  if (distance == 8) return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  if (distance == 4) return __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  if (distance == 2) return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// x[0]: in lane s of every share, the sum over the share of x[s].
INLINE void gather_step(const int distance, const int share, f32x16* x) {
  if (distance >= share) return;
  UNROLL for (int i = 0; i < distance; ++i) x[i] =
      low_halves(distance, x[i], x[i + distance]) + high_halves(distance, x[i], x[i + distance]);
}

INLINE void gather_shares(const int share, f32x16* x) {
  gather_step(8, share, x);
  gather_step(4, share, x);
  gather_step(2, share, x);
  gather_step(1, share, x);
}

// Share i of x[j] and share j of x[i] change places.
INLINE void transpose_step(const int distance, const int share, f32x16* x) {
  if (distance < share) return;
  const int other = distance / share;
  UNROLL for (int i = 0; i < LANES / share; ++i) {
    if (i & other) continue;
    f32x16 low = low_halves(distance, x[i], x[i + other]);
    x[i + other] = high_halves(distance, x[i], x[i + other]);
    x[i] = low;
  }
}

INLINE void transpose_shares(const int share, f32x16* x) {
  transpose_step(8, share, x);
  transpose_step(4, share, x);
  transpose_step(2, share, x);
  transpose_step(1, share, x);
}

// The largest, or the sum, of a share's lanes in all of them.
INLINE f32x16 max_of_shares(const int share, f32x16 x) {
  if (share > 8) x = max_f32(low_halves(8, x, x), high_halves(8, x, x));
  if (share > 4) x = max_f32(low_halves(4, x, x), high_halves(4, x, x));
  if (share > 2) x = max_f32(low_halves(2, x, x), high_halves(2, x, x));
  if (share > 1) x = max_f32(low_halves(1, x, x), high_halves(1, x, x));
  return x;
}

INLINE f32x16 sum_of_shares(const int share, f32x16 x) {
  if (share > 8) x = low_halves(8, x, x) + high_halves(8, x, x);
  if (share > 4) x = low_halves(4, x, x) + high_halves(4, x, x);
  if (share > 2) x = low_halves(2, x, x) + high_halves(2, x, x);
  if (share > 1) x = low_halves(1, x, x) + high_halves(1, x, x);
  return x;
}

INLINE void prefetch_row(const uint16_t* row, size_t dim) {
  for (size_t d = 0; d < dim; d += 64 / sizeof *row) __builtin_prefetch(row + d, 0, 2);
}

// Where the keys or values of `count` positions from `t` on lie. Meanwhile what will be wanted next, `ahead` positions
// on but before `end`, is on its way: pages lie apart, and the hardware's own prefetch stops at the end of one.
INLINE void find_rows(const attention* a, size_t batch_row, int kind, size_t head, size_t t, size_t count,
                      const size_t ahead, size_t end, const uint16_t** rows) {
  size_t dim = a->shape.head_dim;
  while (count) {
    size_t in_page = min_size(count, a->shape.page_size - t % a->shape.page_size);
    const uint16_t* row = a->cache + cache_index(&a->shape, batch_row, a->layer, kind, head, t);
    size_t next = t + ahead < end ? t + ahead : t;
    const uint16_t* later = a->cache + cache_index(&a->shape, batch_row, a->layer, kind, head, next);
    for (size_t i = 0; i < in_page; ++i, row += dim, later += dim) {
      prefetch_row(later, dim);
      *rows++ = row;
    }
    t += in_page;
    count -= in_page;
  }
}

// Rows as float32 [count, stride], padded with zeros to whole vectors.
INLINE void widen(const attention* a, const uint16_t* const* rows, size_t count, const size_t stride, float* out) {
  size_t dim = a->shape.head_dim;
  for (size_t i = 0; i < count; ++i, out += stride) {
    if (a->element == F16)
      load_row(F16, out, rows[i], dim);
    else
      load_row(BF16, out, rows[i], dim);
  }
}

// Which lanes leave out which steps of a product: all but steps first[v] up to last[v].
typedef struct {
  i32x16 first[MAX_VECTORS], last[MAX_VECTORS];
} step_range;

// c[r] = factor * c[r] + the sum over k of a[r, k] * b[k]: `rows` rows, each of whose elements is `share` floats that
// meet all lanes of b[k]. Lanes leave out what is not in their range, if there is one: a factor of zero would not do,
// as it does not cancel a NaN.
INLINE void multiply_rows(const layout l, const int rows, const float* a, const size_t row_stride,
                          const size_t step_stride, const float* b, size_t depth, const f32x16* factor,
                          const step_range* range, float* c) {
  f32x16 sum[SUMS][MAX_VECTORS];
  UNROLL for (int r = 0; r < rows; ++r) {
    UNROLL for (int v = 0; v < l.vectors; ++v) sum[r][v] =
        factor ? load_f32(c + (r * l.vectors + v) * LANES) * factor[v] : splat(0.0f);
  }
  for (size_t k = 0; k < depth; ++k, a += step_stride, b += l.vectors * LANES) {
    i32x16 step = splat_i32((int32_t)k);
    UNROLL for (int r = 0; r < rows; ++r) {
      f32x16 element = repeat(l.share, a + (size_t)r * row_stride);
      UNROLL for (int v = 0; v < l.vectors; ++v) {
        f32x16 next = sum[r][v] + element * load_f32(b + v * LANES);
        if (range) {
          i32x16 inside = (i32x16)(step >= range->first[v]) & (i32x16)(step <= range->last[v]);
          next = select_f32(inside, next, sum[r][v]);
        }
        sum[r][v] = next;
      }
    }
  }
  UNROLL for (int r = 0; r < rows; ++r) {
    UNROLL for (int v = 0; v < l.vectors; ++v) store_f32(c + (r * l.vectors + v) * LANES, sum[r][v]);
  }
}

// The same for any number of rows.
INLINE void multiply(const layout l, size_t rows, const float* a, const size_t row_stride, const size_t step_stride,
                     const float* b, size_t depth, const f32x16* factor, const step_range* range, float* c) {
  const int most = SUMS / l.vectors, few = most > 4 ? 4 : 1;
  size_t r = 0, row_floats = (size_t)l.vectors * LANES;
  for (; r + (size_t)most <= rows; r += (size_t)most)
    multiply_rows(l, most, a + r * row_stride, row_stride, step_stride, b, depth, factor, range, c + r * row_floats);
  for (; few > 1 && r + (size_t)few <= rows; r += (size_t)few)
    multiply_rows(l, few, a + r * row_stride, row_stride, step_stride, b, depth, factor, range, c + r * row_floats);
  for (; r < rows; ++r)
    multiply_rows(l, 1, a + r * row_stride, row_stride, step_stride, b, depth, factor, range, c + r * row_floats);
}

// sums[q] = factor * sums[q] + the sum over k of weights[k, q] * values[k], for `queries` queries from `first` on and
// `vectors` vectors of their elements from `d` on; a single one may reach past `dim`, the last. A query's factor stands
// in its first lane, its weights of `share` positions in its share of every vector of weights.
INLINE void add_elements(const cache_element e, const layout l, const int queries, const int vectors, size_t first,
                         size_t d, size_t dim, const uint16_t* const* values, const float* weights, size_t count,
                         const float* factor, const step_range* range, float* sums) {
  f32x16 sum[SUMS][SUMS];
  const size_t lane = first * (size_t)l.share, stride = ceil_div(dim, LANES) * LANES;
  UNROLL for (int q = 0; q < queries; ++q) UNROLL for (int v = 0; v < vectors; ++v) sum[q][v] =
      load_f32(sums + (first + (size_t)q) * stride + d + v * LANES) * factor[lane + (size_t)(q * l.share)];
  for (size_t k = 0; k < count; ++k) {
    const float* weight = weights + (k & ~(size_t)(l.share - 1)) * LANES + (k & (size_t)(l.share - 1)) + lane;
    f32x16 value[SUMS];
    UNROLL for (int v = 0; v < vectors; ++v) value[v] =
        load_elements(e, values[k] + d + v * LANES, vectors > 1 ? LANES : dim - d);
    UNROLL for (int q = 0; q < queries; ++q) {
      f32x16 factor_of_value = splat(weight[q * l.share]);
      UNROLL for (int v = 0; v < vectors; ++v) {
        f32x16 next = sum[q][v] + value[v] * factor_of_value;
        if (range) {
          const size_t at = lane + (size_t)(q * l.share);
          int32_t inside = -((int32_t)k >= range->first[0][at] && (int32_t)k <= range->last[0][at]);
          next = select_f32(splat_i32(inside), next, sum[q][v]);
        }
        sum[q][v] = next;
      }
    }
  }
  UNROLL for (int q = 0; q < queries; ++q) UNROLL for (int v = 0; v < vectors; ++v)
      store_f32(sums + (first + (size_t)q) * stride + d + v * LANES, sum[q][v]);
}

// The same for all elements of all queries, whose sums are padded to whole vectors.
INLINE void add_values(const cache_element e, const layout l, size_t dim, const uint16_t* const* values,
                       const float* weights, size_t count, f32x16 factors, const step_range* range, float* sums) {
  const int all = LANES / l.share, queries = all < SUMS ? all : SUMS;
  const int most = SUMS / queries < MOST_VALUES ? SUMS / queries : MOST_VALUES;
  float factor[LANES];
  store_f32(factor, factors);
  for (size_t first = 0; first < (size_t)all; first += (size_t)queries) {
    size_t d = 0;
    for (; most > 1 && d + (size_t)most * LANES <= dim; d += (size_t)most * LANES)
      add_elements(e, l, queries, most, first, d, dim, values, weights, count, factor, range, sums);
    for (; d < dim; d += LANES)
      add_elements(e, l, queries, 1, first, d, dim, values, weights, count, factor, range, sums);
  }
}

// Takes in `count` positions from `t` on. Unless `masked`, all queries that see anything see them all.
INLINE void attend_positions(const attention* a, const layout l, const int masked, size_t batch_row, size_t head,
                             size_t t, size_t count, size_t end, attention_state* state) {
  const size_t row_floats = (size_t)l.vectors * LANES;
  size_t steps = ceil_div(a->shape.head_dim, (size_t)l.share), scores = ceil_div(count, (size_t)l.share);
  float* p = state->products;

  // Stage 1: scores, those of `share` positions in each vector.
  const uint16_t* rows[MAX_POSITIONS];
  find_rows(a, batch_row, KEY, head, t, count, l.positions, end, rows);
  widen(a, rows, count, l.stride, state->wide);
  multiply(l, count, state->wide, l.stride, (size_t)l.share, state->queries, steps, 0, 0, p);
  const int hides = masked || l.share > 1;  // the last vector may hold positions that are not there
  f32x16 highest[MAX_VECTORS];
  UNROLL for (int v = 0; v < l.vectors; ++v) highest[v] = state->maximum[v];
  i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (size_t i = 0; i < scores; ++i) {
    UNROLL for (int v = 0; v < l.vectors; ++v) {
      f32x16 x[LANES];
      UNROLL for (int s = 0; s < l.share; ++s) x[s] =
          load_f32(p + (i * (size_t)l.share + (size_t)s) * row_floats + v * LANES);
      gather_shares(l.share, x);
      if (a->softcap != 0.0f) x[0] = tanh_f32(x[0] * (1.0f / a->softcap)) * a->softcap;
      if (hides) {
        i32x16 position = (lane & (l.share - 1)) + (int32_t)(t + i * (size_t)l.share);
        i32x16 seen = (i32x16)(position < splat_i32((int32_t)(t + count)));
        if (masked) seen &= (i32x16)(position >= state->first[v]) & (i32x16)(position <= state->last[v]);
        x[0] = select_f32(seen, x[0], splat(LOWEST));
      }
      highest[v] = max_f32(highest[v], x[0]);
      store_f32(p + i * row_floats * (size_t)l.share + v * LANES, x[0]);
    }
  }

  // Stage 2: move the maximum, weigh.
  f32x16 shrink[MAX_VECTORS];
  UNROLL for (int v = 0; v < l.vectors; ++v) {
    highest[v] = max_of_shares(l.share, highest[v]);
    shrink[v] = exp_f32(state->maximum[v] - highest[v]);
    state->maximum[v] = highest[v];
    state->total[v] *= shrink[v];
  }
  for (size_t i = 0; i < scores; ++i) {
    UNROLL for (int v = 0; v < l.vectors; ++v) {
      float* at = p + i * (size_t)l.share * row_floats + v * LANES;
      f32x16 score = load_f32(at), weight = exp_f32(score - highest[v]);
      if (hides) weight = select_f32((i32x16)(score == splat(LOWEST)), splat(0.0f), weight);
      state->total[v] += weight;
      store_f32(at, weight);
    }
  }

  // Stage 3: add the weighted values of what each lane sees.
  step_range seen;
  UNROLL for (int v = 0; v < l.vectors; ++v) {
    seen.first[v] = state->first[v] - (int32_t)t;
    seen.last[v] = state->last[v] - (int32_t)t;
  }
  find_rows(a, batch_row, VALUE, head, t, count, l.positions, end, rows);
  if (l.share > 1) {
    if (a->element == F16)
      add_values(F16, l, a->shape.head_dim, rows, p, count, shrink[0], masked ? &seen : 0, state->sums);
    else
      add_values(BF16, l, a->shape.head_dim, rows, p, count, shrink[0], masked ? &seen : 0, state->sums);
  } else {
    widen(a, rows, count, l.stride, state->wide);
    multiply(l, steps, state->wide, 1, l.stride, p, count, shrink, masked ? &seen : 0, state->sums);
  }
}

// Moves 16 elements of all queries between rows [query, stride] and lanes.
INLINE void rows_to_lanes(const layout l, const float* rows, float* lanes) {
  UNROLL for (int v = 0; v < l.vectors; ++v) {
    f32x16 x[LANES];
    UNROLL for (int i = 0; i < LANES / l.share; ++i) x[i] =
        load_f32(rows + (size_t)(v * LANES / l.share + i) * l.stride);
    transpose_shares(l.share, x);
    UNROLL for (int i = 0; i < LANES / l.share; ++i) store_f32(lanes + (i * l.vectors + v) * LANES, x[i]);
  }
}

INLINE void lanes_to_rows(const layout l, const float* lanes, float* rows) {
  UNROLL for (int v = 0; v < l.vectors; ++v) {
    f32x16 x[LANES];
    UNROLL for (int i = 0; i < LANES / l.share; ++i) x[i] = load_f32(lanes + (i * l.vectors + v) * LANES);
    transpose_shares(l.share, x);
    UNROLL for (int i = 0; i < LANES / l.share; ++i)
        store_f32(rows + (size_t)(v * LANES / l.share + i) * l.stride, x[i]);
  }
}

// Queries to their lanes, rotated and scaled; by way of rows that are padded with zeros to whole vectors.
INLINE void load_queries(const attention* a, const layout l, const query_block* block, attention_state* state) {
  size_t dim = a->shape.head_dim, chunks = ceil_div(dim, LANES);
  const size_t chunk_floats = (size_t)(LANES / l.share * l.vectors) * LANES;
  for (size_t i = 0; i < (size_t)(l.vectors * LANES / l.share); ++i) {
    float* row = state->wide + i * l.stride;
    for (size_t c = 0; c < chunks; ++c) store_f32(row + c * LANES, splat(0.0f));
    if (i >= block->count) continue;
    const query* q = &block->queries[i];
    const float* in = find_head(&a->queries, q->token, q->head, dim);
    if (a->rotation.cos) {
      rotate_head(row, in, &a->rotation, q->token, dim);
      in = row;
    }
    for (size_t d = 0; d < dim; ++d) row[d] = in[d] * a->scale;
  }
  for (size_t c = 0; c < chunks; ++c)
    rows_to_lanes(l, state->wide + c * LANES, state->queries + c * chunk_floats);
  for (size_t i = 0; i < chunks * chunk_floats; i += LANES) store_f32(state->sums + i, splat(0.0f));
}

// What the lanes see, and that they have seen nothing.
INLINE void start_lanes(const layout l, const query_block* block, attention_state* state) {
  UNROLL for (int v = 0; v < l.vectors; ++v) {
    state->first[v] = splat_i32(0);
    state->last[v] = splat_i32(-1);
    state->maximum[v] = splat(LOWEST);
    state->total[v] = splat(0.0f);
  }
  for (size_t lane = 0; lane < block->count * (size_t)l.share; ++lane) {
    state->first[lane / LANES][lane % LANES] = block->queries[lane / (size_t)l.share].first;
    state->last[lane / LANES][lane % LANES] = block->queries[lane / (size_t)l.share].last;
  }
}

// From lanes to rows: divided by the total, or with the maximum and the total behind.
INLINE void store_outputs(const attention* a, const layout l, const query_block* block, const attention_state* state) {
  size_t dim = a->shape.head_dim, chunks = ceil_div(dim, LANES);
  const size_t chunk_floats = (size_t)(LANES / l.share * l.vectors) * LANES;
  float* rows = l.share > 1 ? state->sums : state->wide;
  size_t stride = l.share > 1 ? chunks * LANES : l.stride;
  for (size_t c = 0; c < chunks && l.share == 1; ++c)
    lanes_to_rows(l, state->sums + c * chunk_floats, rows + c * LANES);
  for (size_t i = 0; i < block->count; ++i) {
    const query* q = &block->queries[i];
    size_t lane = i * (size_t)l.share;
    const float* row = rows + i * stride;
    float total = state->total[lane / LANES][lane % LANES];
    float factor = a->is_partial ? 1.0f : 1.0f / total;
    for (size_t d = 0; d < dim; ++d) q->output[d] = q->last < 0 ? 0.0f : row[d] * factor;
    if (!a->is_partial) continue;
    q->output[dim] = state->maximum[lane / LANES][lane % LANES];
    q->output[dim + 1] = total;
  }
}

// Sets out for the first positions, while queries are brought to their lanes.
INLINE void prefetch_first(const attention* a, const layout l, const query_block* block, size_t batch_row,
                           size_t head) {
  if (block->begin >= block->end) return;
  size_t t = (size_t)block->begin, dim = a->shape.head_dim;
  const uint16_t* key = a->cache + cache_index(&a->shape, batch_row, a->layer, KEY, head, t);
  const uint16_t* value = a->cache + cache_index(&a->shape, batch_row, a->layer, VALUE, head, t);
  size_t in_page = min_size((size_t)block->end - t, a->shape.page_size - t % a->shape.page_size);
  for (size_t i = 0; i < min_size(in_page, l.positions); ++i) {
    prefetch_row(key + i * dim, dim);
    prefetch_row(value + i * dim, dim);
  }
}

// All positions that the block's queries see. Most lie before all of them, or in all their windows.
INLINE void attend_block(const attention* a, const layout l, const query_block* block, size_t batch_row, size_t head,
                         attention_state* state) {
  prefetch_first(a, l, block, batch_row, head);
  load_queries(a, l, block, state);
  start_lanes(l, block, state);
  for (int32_t t = block->begin; t < block->end;) {
    int is_full = t >= block->full_begin && t < block->full_end;
    int32_t limit = t < block->full_begin ? block->full_begin : is_full ? block->full_end : block->end;
    limit = limit < block->end ? limit : block->end;
    size_t count = min_size(l.positions, (size_t)(limit - t));
    if (is_full)
      attend_positions(a, l, 0, batch_row, head, (size_t)t, count, (size_t)block->end, state);
    else
      attend_positions(a, l, 1, batch_row, head, (size_t)t, count, (size_t)block->end, state);
    t += (int32_t)count;
  }
  UNROLL for (int v = 0; v < l.vectors; ++v) state->total[v] = sum_of_shares(l.share, state->total[v]);
  store_outputs(a, l, block, state);
}

// Functions for each way to share lanes, and for two sizes of heads, so that a frame stays below 64 kB.
#define DEFINE_ATTEND(name, head_dim, positions, vectors, share)                                                       \
  static __attribute__((noinline)) void attend_##name(const attention* a, const query_block* block, size_t batch_row,  \
                                                      size_t head) {                                                   \
    enum { STRIDE = head_dim + PADDING };                                                                              \
    float queries[head_dim * LANES * vectors], sums[head_dim * LANES * vectors];                                       \
    float wide[STRIDE * positions], products[positions * LANES * vectors];                                             \
    const layout l = {vectors, share, STRIDE, positions};                                                              \
    attention_state state;                                                                                             \
    state.queries = queries;                                                                                           \
    state.sums = sums;                                                                                                 \
    state.wide = wide;                                                                                                 \
    state.products = products;                                                                                         \
    attend_block(a, l, block, batch_row, head, &state);                                                                \
  }
DEFINE_ATTEND(128_16, 128, 32, 1, 16)
DEFINE_ATTEND(128_8, 128, 32, 1, 8)
DEFINE_ATTEND(128_4, 128, 32, 1, 4)
DEFINE_ATTEND(128_2, 128, 32, 1, 2)
DEFINE_ATTEND(128_1, 128, 32, 1, 1)
DEFINE_ATTEND(128_pair, 128, 32, 2, 1)
DEFINE_ATTEND(256_16, 256, 16, 1, 16)
DEFINE_ATTEND(256_8, 256, 16, 1, 8)
DEFINE_ATTEND(256_4, 256, 16, 1, 4)
DEFINE_ATTEND(256_2, 256, 16, 1, 2)
DEFINE_ATTEND(256_1, 256, 16, 1, 1)

// How many queries a block may have.
INLINE size_t most_queries(size_t head_dim) { return head_dim <= 128 ? MAX_QUERIES : LANES; }

INLINE void attend(const attention* a, const query_block* block, size_t batch_row, size_t head) {
  int is_small = a->shape.head_dim <= 128;
  if (block->count == 1)
    (is_small ? attend_128_16 : attend_256_16)(a, block, batch_row, head);
  else if (block->count == 2)
    (is_small ? attend_128_8 : attend_256_8)(a, block, batch_row, head);
  else if (block->count <= 4)
    (is_small ? attend_128_4 : attend_256_4)(a, block, batch_row, head);
  else if (block->count <= 8)
    (is_small ? attend_128_2 : attend_256_2)(a, block, batch_row, head);
  else if (block->count <= 16)
    (is_small ? attend_128_1 : attend_256_1)(a, block, batch_row, head);
  else
    attend_128_pair(a, block, batch_row, head);
}
