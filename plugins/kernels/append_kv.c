// Stores the keys and values of new tokens in their pages, rounded to halves.
#include "cache.h"
#include "lanes.h"

INLINE void store_row(f16* out, const float* in, size_t count) {
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) store_f16(out + i, load_f32(in + i));
  for (; i < count; ++i) out[i] = f16_from_f32_scalar(in[i]);
}

// Stores tokens workgroup * tokens_per_workgroup and on, of batch * seq.
//   cache       see cache.h; written in place
//   key, value  float32 [batch, seq, kv_heads, head_dim]
//   page_table  int32 [batch, table]
//   positions   int32 [batch, seq]; a token with a negative one is not stored
KERNEL void llmir_append_kv_f16(f16* restrict cache, size_t cache_offset, const float* restrict key, size_t key_offset,
                                const float* restrict value, size_t value_offset, const int32_t* restrict page_table,
                                size_t page_table_offset, const int32_t* restrict positions, size_t positions_offset,
                                size_t batch, size_t seq, size_t kv_heads, size_t head_dim, size_t page_size,
                                size_t table, size_t layers, size_t layer, size_t workgroup,
                                size_t tokens_per_workgroup) {
  cache_shape shape = {page_table + page_table_offset, table, layers, kv_heads, page_size, head_dim};
  size_t first = workgroup * tokens_per_workgroup, end = min_size(batch * seq, first + tokens_per_workgroup);
  for (size_t token = first; token < end; ++token) {
    int32_t position = positions[positions_offset + token];
    if (position < 0) continue;
    for (size_t head = 0; head < kv_heads; ++head) {
      size_t source = (token * kv_heads + head) * head_dim;
      size_t at = cache_index(&shape, token / seq, layer, KEY, head, (size_t)position);
      store_row(cache + cache_offset + at, key + key_offset + source, head_dim);
      at = cache_index(&shape, token / seq, layer, VALUE, head, (size_t)position);
      store_row(cache + cache_offset + at, value + value_offset + source, head_dim);
    }
  }
}
