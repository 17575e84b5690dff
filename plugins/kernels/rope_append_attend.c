// One new token a row: rotates its query and key, stores its key and value, and attends to all that the row holds.
//
// A long row is split over workgroups, each of which takes a run of its pages and leaves partial results that
// llmir_merge_attention joins. The new token is the last that its row sees, so it falls to the last split, which
// stores it before it reads it; the others never look where that one writes.
#include "attention.h"

typedef struct {
  heads_of_tokens keys, values;
  uint16_t* cache;
} new_token;

INLINE void store_token(const attention* a, const new_token* new, size_t batch_row, size_t head, size_t position) {
  size_t dim = a->shape.head_dim;
  float key[LARGEST_HEAD];
  rotate_head(key, find_head(&new->keys, batch_row, head, dim), &a->rotation, batch_row, dim);
  uint16_t* key_out = new->cache + cache_index(&a->shape, batch_row, a->layer, KEY, head, position);
  uint16_t* value_out = new->cache + cache_index(&a->shape, batch_row, a->layer, VALUE, head, position);
  const float* value = find_head(&new->values, batch_row, head, dim);
  if (a->element == F16) {
    store_row(F16, key_out, key, dim);
    store_row(F16, value_out, value, dim);
  } else {
    store_row(BF16, key_out, key, dim);
    store_row(BF16, value_out, value, dim);
  }
}

// Cuts what a block sees to the split's run of whole pages. The last split's run always ends with the last page.
INLINE void take_split(const attention* a, query_block* block, size_t split, size_t splits) {
  if (block->begin >= block->end) return;
  size_t size = a->shape.page_size, first_page = (size_t)block->begin / size;
  size_t pages = ceil_div((size_t)block->end, size) - first_page;
  int32_t begin = (int32_t)((first_page + pages * split / splits) * size);
  int32_t end = (int32_t)((first_page + pages * (split + 1) / splits) * size);
  block->begin = block->full_begin = begin > block->begin ? begin : block->begin;
  block->end = block->full_end = end < block->end ? end : block->end;
}

INLINE void attend_split(const attention* a, const new_token* new, int32_t position, float* partials, size_t heads,
                         size_t splits, size_t split, size_t head, size_t batch_row) {
  size_t group = heads / a->shape.kv_heads, dim = a->shape.head_dim;
  if (split == splits - 1 && position >= 0) store_token(a, new, batch_row, head, (size_t)position);
  for (size_t first = 0; first < group;) {
    query_block block;
    clear_block(&block);
    for (; first < group && block.count < most_queries(dim); ++first) {
      size_t query_head = head * group + first;
      float* output = partials + ((batch_row * heads + query_head) * splits + split) * (dim + 2);
      add_query(a, &block, batch_row, query_head, position, output);
    }
    take_split(a, &block, split, splits);
    attend(a, &block, batch_row, head);
  }
}

// One workgroup takes a split of what one row sees of one key head.
//   cache              see cache.h; written in place
//   query, key, value  float32 rows of tokens, which may be the same; that of batch row b begins at b * stride, and in
//                      it, at `first`, heads [heads or kv_heads, head_dim], head_dim even and at most 256
//   page_table         int32 [batch, table]
//   positions          int32 [batch]; a row with a negative one is idle: nothing is stored, its partials are empty
//   cosines, sines     float32 [batch, head_dim]
//   partials           float32 [batch, heads, splits, head_dim + 2]: the sum of weighted values, the maximum, the total
//   window, softcap    see llmir_paged_attention
#define DEFINE_ROPE_APPEND_ATTEND(name, kind)                                                                          \
  KERNEL void llmir_rope_append_attend_##name(                                                                         \
      uint16_t* cache, size_t cache_offset, const float* restrict query, size_t query_offset,                          \
      const float* restrict key, size_t key_offset, const float* restrict value, size_t value_offset,                  \
      const int32_t* restrict page_table, size_t page_table_offset, const int32_t* restrict positions,                 \
      size_t positions_offset, const float* restrict cosines, size_t cosines_offset, const float* restrict sines,      \
      size_t sines_offset, float* restrict partials, size_t partials_offset, size_t heads, size_t kv_heads,            \
      size_t head_dim, size_t page_size, size_t table, size_t layers, size_t layer, size_t query_stride,               \
      size_t query_first, size_t key_stride, size_t key_first, size_t value_stride, size_t value_first, size_t window, \
      float scale, float softcap, size_t splits, size_t split, size_t head, size_t batch_row) {                        \
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
        .is_partial = 1,                                                                                               \
    };                                                                                                                 \
    const new_token new = {                                                                                            \
        {key + key_offset, key_stride, key_first},                                                                     \
        {value + value_offset, value_stride, value_first},                                                             \
        cache + cache_offset,                                                                                          \
    };                                                                                                                 \
    int32_t position = positions[positions_offset + batch_row];                                                        \
    attend_split(&a, &new, position, partials + partials_offset, heads, splits, split, head, batch_row);               \
  }
DEFINE_ROPE_APPEND_ATTEND(f16, F16)
DEFINE_ROPE_APPEND_ATTEND(bf16, BF16)
