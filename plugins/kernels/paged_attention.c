// Causal attention of new tokens over what a paged cache holds: softmax(scale * q k) v, page by page.
//
// A query here is one head of one token. Queries that share a key head (the group's heads of successive tokens) are
// taken 16 at a time, one to a lane, so that scores, maxima and sums stay in their lanes and grouped heads read the
// same key instead of a copy. Keys and values come some positions at a time: they are widened once and broadcast
// element by element, for decode (lanes are the heads of one token) as for prefill.
//
// The softmax is online: a running maximum, sum and weighted value for each lane, rescaled when the maximum moves.
#include "cache.h"
#include "lanes.h"

enum {
  POSITIONS = 8,  // that are taken together: as many scores as leave room in the registers
  PADDING = 16,   // elements between rows of widened keys, which would otherwise all start in the same cache bank
};

#define LOWEST (-1e30f)  // stands for a score that is not seen; finite, for LOWEST - LOWEST must be 0

typedef struct {
  const float* query;  // [batch, seq, heads, head_dim]
  const f16* cache;
  const int32_t* positions;  // [batch, seq]
  float* output;             // like query
  cache_shape shape;
  size_t seq, heads, layer, window;
  float scale, softcap;
} attention;

// Sixteen queries: where they are, and what they see. A lane without a query sees nothing, nor does a token with a
// negative position, whose output is zero.
typedef struct {
  size_t offset[LANES];          // element offset of the query, and of its output
  size_t count;                  // of lanes with a query
  i32x16 first, last;            // positions that the lane sees, both included; none where last < first
  int32_t begin, end;            // first and one past the last that any lane sees
  int32_t full_begin, full_end;  // what every lane sees that sees anything
} query_lanes;

INLINE query_lanes find_lanes(const attention* a, size_t batch_row, size_t head, size_t block) {
  query_lanes q = {.first = splat_i32(0), .last = splat_i32(-1), .begin = INT32_MAX, .full_end = INT32_MAX};
  size_t group = a->heads / a->shape.kv_heads;
  q.count = min_size(LANES, a->seq * group - block * LANES);
  for (size_t lane = 0; lane < q.count; ++lane) {
    size_t index = block * LANES + lane, token = batch_row * a->seq + index / group;
    q.offset[lane] = (token * a->heads + head * group + index % group) * a->shape.head_dim;
    int32_t last = a->positions[token];
    if (last < 0) continue;
    int32_t first = a->window && (size_t)last >= a->window ? last + 1 - (int32_t)a->window : 0;
    q.first[lane] = first;
    q.last[lane] = last;
    q.begin = first < q.begin ? first : q.begin;
    q.end = last + 1 > q.end ? last + 1 : q.end;
    q.full_begin = first > q.full_begin ? first : q.full_begin;
    q.full_end = last + 1 < q.full_end ? last + 1 : q.full_end;
  }
  return q;
}

INLINE void widen_row(float* out, const f16* in, size_t count) {
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) store_f32(out + i, load_f16(in + i));
  for (; i < count; ++i) out[i] = f32_from_f16_scalar(in[i]);
}

// `count` positions from `t` on, of one page, as float32 [rows, stride]; those that are missing are zero, so that
// whatever lies behind a row's end never gets near a result.
INLINE void widen(const attention* a, size_t batch_row, int kind, size_t head, size_t t, size_t count, size_t rows,
                  size_t stride, float* out) {
  size_t dim = a->shape.head_dim;
  const f16* in = a->cache + cache_index(&a->shape, batch_row, a->layer, kind, head, t);
  for (size_t i = 0; i < count; ++i) widen_row(out + i * stride, in + i * dim, dim);
  for (size_t i = count; i < rows; ++i)
    for (size_t d = 0; d < dim; ++d) out[i * stride + d] = 0.0f;
}

// What a block of queries carries from position to position: float32 [head_dim, 16] each, and a buffer of float32
// [POSITIONS, stride]. The lane's highest score so far, and the sum of its weights.
typedef struct {
  float *queries, *sums, *wide;
  f32x16 maximum, total;
} attention_state;

// Takes in `count` positions from `t` on, of one page. Unless `masked`, all lanes that see anything see them all.
INLINE void attend_positions(const attention* a, const query_lanes* q, size_t batch_row, size_t head, size_t t,
                             size_t count, const int masked, const size_t stride, attention_state* state) {
  size_t dim = a->shape.head_dim;
  const float* wide = state->wide;

  // Stage 1: scores.
  widen(a, batch_row, KEY, head, t, count, POSITIONS, stride, state->wide);
  f32x16 p[POSITIONS];
  UNROLL for (int i = 0; i < POSITIONS; ++i) p[i] = splat(0.0f);
  for (size_t d = 0; d < dim; ++d) {
    f32x16 query = load_f32(state->queries + d * LANES);
    UNROLL for (int i = 0; i < POSITIONS; ++i) p[i] += query * wide[(size_t)i * stride + d];
  }
  if (a->softcap != 0.0f) {
    float inverse = 1.0f / a->softcap;
    UNROLL for (int i = 0; i < POSITIONS; ++i) p[i] = tanh_f32(p[i] * inverse) * a->softcap;
  }

  // Stage 2: hide what a lane does not see.
  i32x16 seen[POSITIONS];
  if (masked) {
    UNROLL for (int i = 0; i < POSITIONS; ++i) {
      i32x16 position = splat_i32((size_t)i < count ? (int32_t)t + i : INT32_MAX);
      seen[i] = (i32x16)(position >= q->first) & (i32x16)(position <= q->last);
      p[i] = select_f32(seen[i], p[i], splat(LOWEST));
    }
  }

  // Stage 3: move the maximum, weigh.
  f32x16 highest = state->maximum;
  UNROLL for (int i = 0; i < POSITIONS; ++i) highest = max_f32(highest, p[i]);
  f32x16 shrink = exp_f32(state->maximum - highest), total = state->total * shrink;
  UNROLL for (int i = 0; i < POSITIONS; ++i) {
    p[i] = exp_f32(p[i] - highest);
    if (masked) p[i] = select_f32(seen[i], p[i], splat(0.0f));
    total += p[i];
  }
  state->maximum = highest;
  state->total = total;

  // Stage 4: add the weighted values. A weight of zero does not cancel a NaN, so a lane skips what it does not see.
  widen(a, batch_row, VALUE, head, t, count, POSITIONS, stride, state->wide);
  for (size_t d = 0; d < dim; ++d) {
    f32x16 sum = load_f32(state->sums + d * LANES) * shrink, other = splat(0.0f);
    UNROLL for (int i = 0; i < POSITIONS; i += 2) {
      f32x16 next = sum + p[i] * wide[(size_t)i * stride + d],
             other_next = other + p[i + 1] * wide[(size_t)(i + 1) * stride + d];
      sum = masked ? select_f32(seen[i], next, sum) : next;
      other = masked ? select_f32(seen[i + 1], other_next, other) : other_next;
    }
    store_f32(state->sums + d * LANES, sum + other);
  }
}

INLINE void attend(const attention* a, const query_lanes* q, size_t batch_row, size_t head, float* queries, float* sums,
                   float* wide, const size_t stride) {
  size_t dim = a->shape.head_dim, page_size = a->shape.page_size;

  // Queries to lanes, scaled.
  for (size_t d = 0; d < dim; ++d) store_f32(queries + d * LANES, splat(0.0f));
  for (size_t lane = 0; lane < q->count; ++lane)
    for (size_t d = 0; d < dim; ++d) queries[d * LANES + lane] = a->query[q->offset[lane] + d] * a->scale;
  for (size_t d = 0; d < dim; ++d) store_f32(sums + d * LANES, splat(0.0f));

  // Most positions lie before all queries of the block, or in all their windows.
  attention_state state = {queries, sums, wide, splat(LOWEST), splat(0.0f)};
  size_t count;
  for (size_t t = (size_t)q->begin; q->begin < q->end && t < (size_t)q->end; t += count) {
    count = min_size(min_size(POSITIONS, page_size - t % page_size), (size_t)q->end - t);
    if (count == POSITIONS && (int32_t)t >= q->full_begin && (int32_t)(t + POSITIONS) <= q->full_end)
      attend_positions(a, q, batch_row, head, t, POSITIONS, 0, stride, &state);
    else
      attend_positions(a, q, batch_row, head, t, count, 1, stride, &state);
  }

  // Divide, and back from lanes to rows.
  f32x16 inverse = 1.0f / state.total;
  for (size_t d = 0; d < dim; ++d) store_f32(sums + d * LANES, load_f32(sums + d * LANES) * inverse);
  for (size_t lane = 0; lane < q->count; ++lane) {
    int is_token = q->last[lane] >= 0;
    for (size_t d = 0; d < dim; ++d) a->output[q->offset[lane] + d] = is_token ? sums[d * LANES + lane] : 0.0f;
  }
}

// Few queries: lanes would lie idle, so they are elements of the head here, and positions where scores are concerned.
enum { FEW_QUERIES = 4, FEW_POSITIONS = 16 };

// Positions `from` up to `to` of `count` that were widened, for one query; zero or more are seen.
INLINE void attend_one(const float* query, const float* keys, const float* values, size_t chunks, const size_t stride,
                       size_t from, size_t to, float softcap, float* sums, float* maximum, float* total) {
  // Stage 1: scores, a position to a lane.
  f32x16 products[FEW_POSITIONS];
  UNROLL for (int i = 0; i < FEW_POSITIONS; ++i) products[i] = splat(0.0f);
  for (size_t c = 0; c < chunks; ++c) {
    f32x16 q = load_f32(query + c * LANES);
    UNROLL for (int i = 0; i < FEW_POSITIONS; ++i) products[i] += q * load_f32(keys + (size_t)i * stride + c * LANES);
  }
  f32x16 scores = reduce_add_each(products);
  if (softcap != 0.0f) scores = tanh_f32(scores * (1.0f / softcap)) * softcap;
  const i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  i32x16 seen = (i32x16)(index >= splat_i32((int32_t)from)) & (i32x16)(index < splat_i32((int32_t)to));
  scores = select_f32(seen, scores, splat(LOWEST));

  // Stage 2: move the maximum, weigh.
  float highest = reduce_max_f32(scores);
  highest = highest > *maximum ? highest : *maximum;
  float shrink = exp_f32(splat(*maximum - highest))[0];
  f32x16 p = select_f32(seen, exp_f32(scores - highest), splat(0.0f));
  *maximum = highest;
  *total = *total * shrink + reduce_add_f32(p);

  // Stage 3: add the weighted values, of seen positions only: a weight of zero does not cancel a NaN.
  float weights[FEW_POSITIONS];
  store_f32(weights, p);
  for (size_t c = 0; c < chunks; ++c) {
    f32x16 sum[4] = {load_f32(sums + c * LANES) * shrink, splat(0.0f), splat(0.0f), splat(0.0f)};
    if (to - from == FEW_POSITIONS) {
      UNROLL for (int i = 0; i < FEW_POSITIONS; ++i) sum[i % 4] +=
          weights[i] * load_f32(values + (size_t)i * stride + c * LANES);
    } else {
      for (size_t i = from; i < to; ++i) sum[0] += weights[i] * load_f32(values + i * stride + c * LANES);
    }
    store_f32(sums + c * LANES, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// `queries` and `sums` are [FEW_QUERIES, stride], `keys` and `values` [FEW_POSITIONS, stride].
INLINE void attend_few(const attention* a, const query_lanes* q, size_t batch_row, size_t head, const size_t stride,
                       float* queries, float* sums, float* keys, float* values) {
  size_t dim = a->shape.head_dim, page_size = a->shape.page_size, chunks = ceil_div(dim, LANES);
  float maximum[FEW_QUERIES], total[FEW_QUERIES];
  for (size_t r = 0; r < q->count; ++r) {
    maximum[r] = LOWEST;
    total[r] = 0.0f;
    for (size_t d = 0; d < chunks * LANES; ++d) {
      queries[r * stride + d] = d < dim ? a->query[q->offset[r] + d] * a->scale : 0.0f;
      sums[r * stride + d] = 0.0f;
    }
  }
  // A head that does not fill its last chunk is padded with zeros. Rows past the last position keep what they held,
  // which no query sees.
  for (size_t i = 0; i < FEW_POSITIONS * stride; ++i) keys[i] = values[i] = 0.0f;

  size_t count;
  for (size_t t = (size_t)q->begin; q->begin < q->end && t < (size_t)q->end; t += count) {
    count = min_size(min_size(FEW_POSITIONS, page_size - t % page_size), (size_t)q->end - t);
    widen(a, batch_row, KEY, head, t, count, count, stride, keys);
    widen(a, batch_row, VALUE, head, t, count, count, stride, values);
    for (size_t r = 0; r < q->count; ++r) {
      int64_t from = (int64_t)q->first[r] - (int64_t)t, to = (int64_t)q->last[r] + 1 - (int64_t)t;
      from = from < 0 ? 0 : from;
      to = to > (int64_t)count ? (int64_t)count : to;
      if (from < to)
        attend_one(queries + r * stride, keys, values, chunks, stride, (size_t)from, (size_t)to, a->softcap,
                   sums + r * stride, &maximum[r], &total[r]);
    }
  }

  for (size_t r = 0; r < q->count; ++r) {
    int is_token = q->last[r] >= 0;
    for (size_t d = 0; d < dim; ++d) a->output[q->offset[r] + d] = is_token ? sums[r * stride + d] / total[r] : 0.0f;
  }
}

// Functions for each size of the buffers, so that a frame is no larger than the head needs: 160 bytes an element.
#define DEFINE_ATTEND(size)                                                                                           \
  static __attribute__((noinline)) void attend_##size(const attention* a, const query_lanes* q, size_t batch_row,     \
                                                      size_t head) {                                                  \
    float queries[size * LANES], sums[size * LANES], wide[(size + PADDING) * POSITIONS];                              \
    attend(a, q, batch_row, head, queries, sums, wide, size + PADDING);                                               \
  }                                                                                                                   \
  static __attribute__((noinline)) void attend_few_##size(const attention* a, const query_lanes* q, size_t batch_row, \
                                                          size_t head) {                                              \
    enum { STRIDE = size + PADDING };                                                                                 \
    float queries[STRIDE * FEW_QUERIES], sums[STRIDE * FEW_QUERIES];                                                  \
    float keys[STRIDE * FEW_POSITIONS], values[STRIDE * FEW_POSITIONS];                                               \
    attend_few(a, q, batch_row, head, STRIDE, queries, sums, keys, values);                                           \
  }
DEFINE_ATTEND(64)
DEFINE_ATTEND(128)
DEFINE_ATTEND(256)

// One workgroup attends for 16 queries: block `block` of the seq * heads / kv_heads queries of a key head.
//   query       float32 [batch, seq, heads, head_dim], head_dim at most 256
//   cache       see cache.h; read in place, and only where a query looks
//   page_table  int32 [batch, table]
//   positions   int32 [batch, seq], negative for padding
//   output      like query
//   window      positions that a token sees, its own included; 0 for all
//   softcap     scores become softcap * tanh(score / softcap); 0 for none
KERNEL void llmir_paged_attention_f16(const float* restrict query, size_t query_offset, const f16* restrict cache,
                                      size_t cache_offset, const int32_t* restrict page_table, size_t page_table_offset,
                                      const int32_t* restrict positions, size_t positions_offset,
                                      float* restrict output, size_t output_offset, size_t seq, size_t heads,
                                      size_t kv_heads, size_t head_dim, size_t page_size, size_t table, size_t layers,
                                      size_t layer, size_t window, float scale, float softcap, size_t block,
                                      size_t head, size_t batch_row) {
  attention a = {
      .query = query + query_offset,
      .cache = cache + cache_offset,
      .positions = positions + positions_offset,
      .output = output + output_offset,
      .shape = {page_table + page_table_offset, table, layers, kv_heads, page_size, head_dim},
      .seq = seq,
      .heads = heads,
      .layer = layer,
      .window = window,
      .scale = scale,
      .softcap = softcap,
  };
  query_lanes q = find_lanes(&a, batch_row, head, block);
  if (q.count <= FEW_QUERIES) {
    if (head_dim <= 64)
      attend_few_64(&a, &q, batch_row, head);
    else if (head_dim <= 128)
      attend_few_128(&a, &q, batch_row, head);
    else
      attend_few_256(&a, &q, batch_row, head);
  } else if (head_dim <= 64) {
    attend_64(&a, &q, batch_row, head);
  } else if (head_dim <= 128) {
    attend_128(&a, &q, batch_row, head);
  } else {
    attend_256(&a, &q, batch_row, head);
  }
}
