// Causal attention of new tokens over what a paged cache holds, their own keys and values included; with a rotary
// embedding of the queries on the way, or without.
#include "attention.h"

// Queries block * MAX_QUERIES and on of the seq * heads / kv_heads queries that share a key head.
INLINE void attend_workgroup(const attention* a, const int32_t* positions, float* output, size_t seq, size_t heads,
                             size_t block, size_t head, size_t batch_row) {
  size_t group = heads / a->shape.kv_heads, dim = a->shape.head_dim;
  size_t first = block * MAX_QUERIES, end = min_size(seq * group, first + MAX_QUERIES);
  while (first < end) {
    query_block queries;
    clear_block(&queries);
    for (; first < end && queries.count < most_queries(dim); ++first) {
      size_t token = batch_row * seq + first / group, query_head = head * group + first % group;
      add_query(a, &queries, token, query_head, positions[token], output + (token * heads + query_head) * dim);
    }
    attend(a, &queries, batch_row, head);
  }
}

// One workgroup attends for 32 queries: block `block` of the seq * heads / kv_heads queries of a key head.
//   query       float32 [batch, seq, heads, head_dim], head_dim at most 256
//   cache       see cache.h; read in place, and only where a query looks
//   page_table  int32 [batch, table]
//   positions   int32 [batch, seq], negative for padding
//   output      like query
//   window      positions that a token sees, its own included; 0 for all
//   softcap     scores become softcap * tanh(score / softcap); 0 for none
#define DEFINE_PAGED_ATTENTION(name, kind)                                                                             \
  KERNEL void llmir_paged_attention_##name(                                                                            \
      const float* restrict query, size_t query_offset, const uint16_t* restrict cache, size_t cache_offset,           \
      const int32_t* restrict page_table, size_t page_table_offset, const int32_t* restrict positions,                 \
      size_t positions_offset, float* restrict output, size_t output_offset, size_t seq, size_t heads,                 \
      size_t kv_heads, size_t head_dim, size_t page_size, size_t table, size_t layers, size_t layer, size_t window,    \
      float scale, float softcap, size_t block, size_t head, size_t batch_row) {                                       \
    const attention a = {                                                                                              \
        .element = kind,                                                                                               \
        .cache = cache + cache_offset,                                                                                 \
        .shape = {page_table + page_table_offset, table, layers, kv_heads, page_size, head_dim},                       \
        .queries = {query + query_offset, heads * head_dim, 0},                                                        \
        .layer = layer,                                                                                                \
        .window = window,                                                                                              \
        .scale = scale,                                                                                                \
        .softcap = softcap,                                                                                            \
    };                                                                                                                 \
    attend_workgroup(&a, positions + positions_offset, output + output_offset, seq, heads, block, head, batch_row);    \
  }
DEFINE_PAGED_ATTENTION(f16, F16)
DEFINE_PAGED_ATTENTION(bf16, BF16)

// The same with queries rotated, head_dim even.
//   query           float32 rows of tokens: the row of a token begins at token * stride, and in it, at `first`, heads
//                   [heads, head_dim]
//   cosines, sines  float32 [batch, seq, head_dim]
//   output          float32 [batch, seq, heads, head_dim]
#define DEFINE_ROPE_ATTEND(name, kind)                                                                                 \
  KERNEL void llmir_rope_attend_##name(                                                                                \
      const float* restrict query, size_t query_offset, const uint16_t* restrict cache, size_t cache_offset,           \
      const int32_t* restrict page_table, size_t page_table_offset, const int32_t* restrict positions,                 \
      size_t positions_offset, const float* restrict cosines, size_t cosines_offset, const float* restrict sines,      \
      size_t sines_offset, float* restrict output, size_t output_offset, size_t seq, size_t heads, size_t kv_heads,    \
      size_t head_dim, size_t page_size, size_t table, size_t layers, size_t layer, size_t query_stride,               \
      size_t query_first, size_t window, float scale, float softcap, size_t block, size_t head, size_t batch_row) {    \
    const attention a = {                                                                                              \
        .element = kind,                                                                                               \
        .cache = cache + cache_offset,                                                                                 \
        .shape = {page_table + page_table_offset, table, layers, kv_heads, page_size, head_dim},                       \
        .queries = {query + query_offset, query_stride, query_first},                                                  \
        .rotation = {cosines + cosines_offset, sines + sines_offset},                                                  \
        .layer = layer,                                                                                                \
        .window = window,                                                                                              \
        .scale = scale,                                                                                                \
        .softcap = softcap,                                                                                            \
    };                                                                                                                 \
    attend_workgroup(&a, positions + positions_offset, output + output_offset, seq, heads, block, head, batch_row);    \
  }
DEFINE_ROPE_ATTEND(f16, F16)
DEFINE_ROPE_ATTEND(bf16, BF16)
