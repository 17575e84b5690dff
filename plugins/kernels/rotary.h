// The rotary embedding: pairs of elements, one in each half of a head, turned by the angle of the token's position.
//
// Queries, keys and values come out of one matrix product, so a head is found by the row of its token, the first
// column of its kind, and its number.
#pragma once

#include "lanes.h"

enum { LARGEST_HEAD = 256 };

typedef struct {
  const float* data;
  size_t stride, first;  // elements between the rows of successive tokens, and before the first head in a row
} heads_of_tokens;

INLINE const float* find_head(const heads_of_tokens* h, size_t token, size_t head, size_t head_dim) {
  return h->data + token * h->stride + h->first + head * head_dim;
}

// Cosines and sines of every token, float32 [batch, seq, head_dim], both halves filled; null where heads are not
// rotated, or were before.
typedef struct {
  const float *cos, *sin;
} rotation;

// out = in * cos + (-second half, first half) * sin; out is another array.
INLINE void rotate_head(float* restrict out, const float* restrict in, const rotation* r, size_t token, size_t dim) {
  size_t half = dim / 2, i = 0;
  const float *cos = r->cos + token * dim, *sin = r->sin + token * dim;
  for (; i + LANES <= half; i += LANES) {
    f32x16 low = load_f32(in + i), high = load_f32(in + half + i);
    store_f32(out + i, low * load_f32(cos + i) - high * load_f32(sin + i));
    store_f32(out + half + i, high * load_f32(cos + half + i) + low * load_f32(sin + half + i));
  }
  for (; i < half; ++i) {
    out[i] = in[i] * cos[i] - in[half + i] * sin[i];
    out[half + i] = in[half + i] * cos[half + i] + in[i] * sin[half + i];
  }
}
