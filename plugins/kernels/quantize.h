// Float32 to quantised activations, a group of 32 at a time.
#pragma once

#include "activations.h"
#include "lanes.h"

// Groups that reach no further from their middle are taken for constant: 127 divided by it would overflow.
#define SMALLEST_REACH 0x1p-120f

typedef struct {
  f32x16 low, high;
} values32;

INLINE values32 load_values(const float* p) { return (values32){load_f32(p), load_f32(p + LANES)}; }

// Whether codes that reach from -127 to 127 have a standard deviation of less than a fifth of that: a few of them are
// outliers, for whose sake the others are rounded coarsely. Of normally distributed groups of 32 that is 1 in 30.
INLINE int is_uneven(int32_t sum, int32_t sum_of_squares) {
  return GROUP * sum_of_squares - sum * sum < GROUP * GROUP * (254 * 254 / 25);
}

// Rounds to x = scale * code + offset, and returns what the rounding left.
INLINE values32 quantize_term(values32 x, const int has_offset, activation_group* out) {
  // Stage 1: the middle, and how far the values reach from it.
  float offset = 0.0f;
  if (has_offset) {
    float most = reduce_max_f32(max_f32(x.low, x.high)), least = -reduce_max_f32(max_f32(-x.low, -x.high));
    offset = 0.5f * most + 0.5f * least;
    x = (values32){x.low - offset, x.high - offset};
  }
  // Magnitudes are compared as integers, so that an infinity or a NaN comes out on top and ends in the scale, where it
  // spoils every product it should spoil.
  union {
    int32_t bits;
    float value;
  } reach = {reduce_max_i32(max_i32((i32x16)x.low & 0x7fffffff, (i32x16)x.high & 0x7fffffff))};
  int is_constant = reach.value < SMALLEST_REACH;
  float inverse = is_constant ? 0.0f : 127.0f / reach.value;
  float scale = is_constant ? 0.0f : reach.value / 127.0f;

  // Stage 2: round to nearest, ties to even. After adding 1.5 * 2^23 the integer stands in the low bits.
  const float to_integer = 0x1.8p23f;
  f32x16 low_shifted = x.low * inverse + to_integer, high_shifted = x.high * inverse + to_integer;
  i32x16 low_codes = (i32x16)((u32x16)low_shifted << 24) >> 24, high_codes = (i32x16)((u32x16)high_shifted << 24) >> 24;

  // Stage 3: store.
  *(i8x16_memory*)out->codes = __builtin_convertvector(low_codes, i8x16);
  *(i8x16_memory*)(out->codes + LANES) = __builtin_convertvector(high_codes, i8x16);
  out->scale = scale;
  out->offset = offset;
  int32_t sum = reduce_add_i32(low_codes + high_codes);
  out->start = CODE_SUM_FACTOR * sum;
  out->low_start = (int16_t)(CODE_SUM_FACTOR * reduce_add_i32(low_codes));
  out->has_rest = !is_constant && is_uneven(sum, reduce_add_i32(low_codes * low_codes + high_codes * high_codes));
  f32x16 low_rounded = low_shifted - to_integer, high_rounded = high_shifted - to_integer;
  return (values32){x.low - scale * low_rounded, x.high - scale * high_rounded};
}

// Writes the record of 32 activations, and none of what the rounding left.
INLINE void quantize_group(values32 x, activation_group* out) {
  quantize_term(x, 1, out);
  out->has_rest = 0;
}

// The same, and the second record, `distance` further, if the group is uneven.
INLINE void quantize_uneven_group(values32 x, size_t distance, activation_group* out) {
  values32 rest = quantize_term(x, 1, out);
  if (out->has_rest) quantize_term(rest, 0, out + distance);
}
