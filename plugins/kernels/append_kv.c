// Stores the keys and values of new tokens in their pages, rounded to the cache's elements; with a rotary embedding of
// the keys on the way, or without.
#include "cache.h"
#include "rotary.h"

typedef struct {
  uint16_t* cache;
  heads_of_tokens keys, values;
  rotation rotation;
  cache_shape shape;
  const int32_t* positions;  // [batch, seq]
  size_t tokens, seq, layer;
} append;

INLINE void append_tokens(const cache_element e, const append* a, size_t workgroup, size_t tokens_per_workgroup) {
  size_t dim = a->shape.head_dim;
  size_t first = workgroup * tokens_per_workgroup, end = min_size(a->tokens, first + tokens_per_workgroup);
  for (size_t token = first; token < end; ++token) {
    if (a->positions[token] < 0) continue;
    size_t row = token / a->seq, position = (size_t)a->positions[token];
    for (size_t head = 0; head < a->shape.kv_heads; ++head) {
      const float* key = find_head(&a->keys, token, head, dim);
      float rotated[LARGEST_HEAD];
      if (a->rotation.cos) {
        rotate_head(rotated, key, &a->rotation, token, dim);
        key = rotated;
      }
      store_row(e, a->cache + cache_index(&a->shape, row, a->layer, KEY, head, position), key, dim);
      store_row(e, a->cache + cache_index(&a->shape, row, a->layer, VALUE, head, position),
                find_head(&a->values, token, head, dim), dim);
    }
  }
}

// Stores tokens workgroup * tokens_per_workgroup and on, of batch * seq.
//   cache       see cache.h; written in place
//   key, value  float32 [batch, seq, kv_heads, head_dim]
//   page_table  int32 [batch, table]
//   positions   int32 [batch, seq]; a token with a negative one is not stored
#define DEFINE_APPEND(name, element)                                                                                   \
  KERNEL void llmir_append_kv_##name(                                                                                  \
      uint16_t* restrict cache, size_t cache_offset, const float* restrict key, size_t key_offset,                     \
      const float* restrict value, size_t value_offset, const int32_t* restrict page_table, size_t page_table_offset,  \
      const int32_t* restrict positions, size_t positions_offset, size_t batch, size_t seq, size_t kv_heads,           \
      size_t head_dim, size_t page_size, size_t table, size_t layers, size_t layer, size_t workgroup,                  \
      size_t tokens_per_workgroup) {                                                                                   \
    const append a = {                                                                                                 \
        .cache = cache + cache_offset,                                                                                 \
        .keys = {key + key_offset, kv_heads * head_dim, 0},                                                            \
        .values = {value + value_offset, kv_heads * head_dim, 0},                                                      \
        .shape = {page_table + page_table_offset, table, layers, kv_heads, page_size, head_dim},                       \
        .positions = positions + positions_offset,                                                                     \
        .tokens = batch * seq,                                                                                         \
        .seq = seq,                                                                                                    \
        .layer = layer,                                                                                                \
    };                                                                                                                 \
    append_tokens(element, &a, workgroup, tokens_per_workgroup);                                                       \
  }
DEFINE_APPEND(f16, F16)
DEFINE_APPEND(bf16, BF16)

// The same with keys rotated, head_dim at most 256 and even.
//   key, value        float32 rows of tokens, which may be the same; the row of a token begins at token * stride, and
//                     in it, at `first`, heads [kv_heads, head_dim]
//   cosines, sines    float32 [batch, seq, head_dim]
#define DEFINE_ROPE_APPEND(name, element)                                                                              \
  KERNEL void llmir_rope_append_##name(                                                                                \
      uint16_t* restrict cache, size_t cache_offset, const float* restrict key, size_t key_offset,                     \
      const float* restrict value, size_t value_offset, const int32_t* restrict page_table, size_t page_table_offset,  \
      const int32_t* restrict positions, size_t positions_offset, const float* restrict cosines,                       \
      size_t cosines_offset, const float* restrict sines, size_t sines_offset, size_t batch, size_t seq,               \
      size_t kv_heads, size_t head_dim, size_t page_size, size_t table, size_t layers, size_t layer,                   \
      size_t key_stride, size_t key_first, size_t value_stride, size_t value_first, size_t workgroup,                  \
      size_t tokens_per_workgroup) {                                                                                   \
    const append a = {                                                                                                 \
        .cache = cache + cache_offset,                                                                                 \
        .keys = {key + key_offset, key_stride, key_first},                                                             \
        .values = {value + value_offset, value_stride, value_first},                                                   \
        .rotation = {cosines + cosines_offset, sines + sines_offset},                                                  \
        .shape = {page_table + page_table_offset, table, layers, kv_heads, page_size, head_dim},                       \
        .positions = positions + positions_offset,                                                                     \
        .tokens = batch * seq,                                                                                         \
        .seq = seq,                                                                                                    \
        .layer = layer,                                                                                                \
    };                                                                                                                 \
    append_tokens(element, &a, workgroup, tokens_per_workgroup);                                                       \
  }
DEFINE_ROPE_APPEND(f16, F16)
DEFINE_ROPE_APPEND(bf16, BF16)
