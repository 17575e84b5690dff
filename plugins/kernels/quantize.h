// Float32 to quantised activations, a group of 32 at a time.
#pragma once

#include "activations.h"
#include "lanes.h"

// Groups that reach no further are taken for zero: 127 divided by it would overflow.
#define SMALLEST_REACH 0x1p-120f

typedef struct {
  f32x16 low, high;
} values32;

INLINE values32 load_values(const float* p) { return (values32){load_f32(p), load_f32(p + LANES)}; }

// The bits of a float and its value.
typedef union {
  int32_t bits;
  float value;
} float_bits;

// Rounds to x = scale * code, and returns what the rounding left.
INLINE values32 quantize_term(values32 x, activation_group* out) {
  // Stage 1: how far the values reach. Magnitudes are compared as integers, so that an infinity or a NaN comes out on top
  // and ends in the scale, where it spoils every product it should spoil.
  float_bits most = {reduce_max_i32(max_i32((i32x16)x.low & 0x7fffffff, (i32x16)x.high & 0x7fffffff))};
  float reach = most.value;
  int is_zero = reach < SMALLEST_REACH;
  float inverse = is_zero ? 0.0f : 127.0f / reach;
  float scale = is_zero ? 0.0f : reach / 127.0f + (reach - reach);  // an infinity becomes a NaN

  // Stage 2: round to nearest, ties to even. After adding 1.5 * 2^23 the integer stands in the low bits.
  const float to_integer = 0x1.8p23f;
  f32x16 low_shifted = x.low * inverse + to_integer, high_shifted = x.high * inverse + to_integer;
  i32x16 low_codes = (i32x16)((u32x16)low_shifted << 24) >> 24, high_codes = (i32x16)((u32x16)high_shifted << 24) >> 24;

  // Stage 3: store.
  *(i8x16_memory*)out->codes = __builtin_convertvector(low_codes, i8x16);
  *(i8x16_memory*)(out->codes + LANES) = __builtin_convertvector(high_codes, i8x16);
  out->scale = scale;
  out->start = CODE_SUM_FACTOR * reduce_add_i32(low_codes + high_codes);
  out->scaled_start = scale * (float)out->start;
  out->low_start = (int16_t)(CODE_SUM_FACTOR * reduce_add_i32(low_codes));
  out->has_rest = 0;
  f32x16 low_rounded = low_shifted - to_integer, high_rounded = high_shifted - to_integer;
  return (values32){x.low - scale * low_rounded, x.high - scale * high_rounded};
}

// Writes the record of 32 activations, and none of what the rounding left.
INLINE void quantize_group(values32 x, activation_group* out) { quantize_term(x, out); }

// The same, and the second record, `distance` further.
INLINE void quantize_group_twice(values32 x, size_t distance, activation_group* out) {
  values32 rest = quantize_term(x, out);
  out->has_rest = out->scale != 0.0f;
  if (out->has_rest) quantize_term(rest, out + distance);
}

// Which groups of a row, or of a part of it, need second records. What rounding does to the row's product with weights
// grows with the square of a group's scale: a few groups with outliers make most of it. They are those whose scale is
// above the geometric mean over the groups that are finite and not zero, which outliers hardly move, by a factor, given
// as its logarithm to base 2, times 2^23. The bits of a float are close to that of the float.
enum { ROOT_OF_TWO = 1 << 22 };

INLINE int32_t most_usual_scale(const activation_group* record, size_t stride, size_t groups, const int32_t factor) {
  const int32_t infinity = 0x7f800000;
  int64_t sum = 0, count = 0;
  for (size_t g = 0; g < groups; ++g, record += stride) {
    float_bits scale = {.value = record->scale};
    if (scale.bits == 0 || scale.bits >= infinity) continue;
    sum += scale.bits;
    ++count;
  }
  return count ? (int32_t)(sum / count) + factor : 0;
}

INLINE int is_outlier(const activation_group* record, int32_t most_usual) {
  float_bits scale = {.value = record->scale};
  return scale.bits > most_usual;
}
