// Where keys and values lie: cache [pages, layers, 2, kv_heads, page_size, head_dim] of f16 or bf16, and for every row
// of a batch a table of the pages that hold its positions in order. Dimension 2 is key, value.
#pragma once

#include "lanes.h"

typedef enum { F16, BF16 } cache_element;

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

// To the nearest bf16, ties to even; a NaN stays one.
INLINE bf16 bf16_from_f32_scalar(float x) {
  union {
    float value;
    uint32_t bits;
  } in = {x};
  if ((in.bits & 0x7fffffffu) > 0x7f800000u) return (bf16)(in.bits >> 16 | 0x40u);
  return (bf16)((in.bits + 0x7fffu + ((in.bits >> 16) & 1u)) >> 16);
}

INLINE void store_bf16(bf16* p, f32x16 x) {
  u32x16 bits = (u32x16)x;
  u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  u32x16 is_nan = (u32x16)(i32x16)((bits & 0x7fffffffu) > 0x7f800000u);
  *(u16x16_memory*)p = __builtin_convertvector((is_nan & (bits >> 16 | 0x40u)) | (~is_nan & rounded), u16x16);
}

INLINE float f32_from_bf16_scalar(bf16 x) {
  union {
    uint32_t bits;
    float value;
  } out = {(uint32_t)x << 16};
  return out.value;
}

// Rounds a row of a key or a value to the cache's elements.
INLINE void store_row(const cache_element e, uint16_t* out, const float* in, size_t count) {
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    if (e == F16)
      store_f16(out + i, load_f32(in + i));
    else
      store_bf16(out + i, load_f32(in + i));
  }
  for (; i < count; ++i) out[i] = e == F16 ? f16_from_f32_scalar(in[i]) : bf16_from_f32_scalar(in[i]);
}

// 16 elements of a row, of which `count` are there; zeros stand for the others.
INLINE f32x16 load_elements(const cache_element e, const uint16_t* in, size_t count) {
  if (count >= LANES) return e == F16 ? load_f16(in) : load_bf16(in);
  f32x16 x = splat(0.0f);
  for (size_t i = 0; i < count; ++i) x[i] = e == F16 ? f32_from_f16_scalar(in[i]) : f32_from_bf16_scalar(in[i]);
  return x;
}

// Widens a row of a key or a value, and fills it up with zeros to whole vectors.
INLINE void load_row(const cache_element e, float* out, const uint16_t* in, size_t count) {
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) store_f32(out + i, e == F16 ? load_f16(in + i) : load_bf16(in + i));
  if (i == count) return;
  size_t end = i + LANES;
  for (; i < count; ++i) out[i] = e == F16 ? f32_from_f16_scalar(in[i]) : f32_from_bf16_scalar(in[i]);
  for (; i < end; ++i) out[i] = 0.0f;
}
