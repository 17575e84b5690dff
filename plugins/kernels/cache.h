// Where keys and values lie: cache [pages, layers, 2, kv_heads, page_size, head_dim] of halves, and for every row of a
// batch a table of the pages that hold its positions in order. Dimension 2 is key, value.
#pragma once

#include "kernel.h"

typedef struct {
  const int32_t* page_table;  // [batch, table]
  size_t table, layers, kv_heads, page_size, head_dim;
} cache_shape;

enum { KEY, VALUE };

// Element offset of a position's key or value. The table's entry for the position is read, and no other.
INLINE size_t cache_index(const cache_shape* shape, size_t batch_row, size_t layer, int kind, size_t head,
                          size_t position) {
  size_t page = (size_t)shape->page_table[batch_row * shape->table + position / shape->page_size];
  size_t index = (page * shape->layers + layer) * 2 + (size_t)kind;
  index = index * shape->kv_heads + head;
  return (index * shape->page_size + position % shape->page_size) * shape->head_dim;
}
