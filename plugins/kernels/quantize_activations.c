// float32 rows to groups of 32 bytes with a scale: done once, whatever the number of matmuls that read the result.
#include "activations.h"
#include "lanes.h"

// Groups whose largest value is below this are taken for zero: 127 divided by it would overflow.
#define SMALLEST 0x1p-120f

INLINE void quantize_group(const float* x, activation_group* out) {
  // Stage 1: the largest magnitude. Compared as integers, so that an infinity or a NaN comes out on top and ends in
  // the scale, where it spoils every product it should spoil.
  f32x16 low = load_f32(x), high = load_f32(x + LANES);
  i32x16 magnitude = max_i32((i32x16)low & 0x7fffffff, (i32x16)high & 0x7fffffff);
  union {
    int32_t bits;
    float value;
  } largest = {reduce_max_i32(magnitude)};
  int is_zero = largest.value < SMALLEST;
  float inverse = is_zero ? 0.0f : 127.0f / largest.value;
  float scale = is_zero ? 0.0f : largest.value / 127.0f;

  // Stage 2: round to nearest, ties to even. After adding 1.5 * 2^23 the integer stands in the low bits.
  f32x16 low_scaled = low * inverse, high_scaled = high * inverse;
  i32x16 low_bits = (i32x16)(low_scaled + 0x1.8p23f), high_bits = (i32x16)(high_scaled + 0x1.8p23f);
  i32x16 low_codes = (low_bits + 128) & 255, high_codes = (high_bits + 128) & 255;

  // Stage 3: store.
  *(u8x16_memory*)out->codes = __builtin_convertvector(low_codes, u8x16);
  *(u8x16_memory*)(out->codes + LANES) = __builtin_convertvector(high_codes, u8x16);
  out->scale = scale;
  out->sum = scale * (float)(reduce_add_i32(low_codes + high_codes) - 128 * GROUP);
}

// Quantises rows workgroup * rows_per_workgroup and on.
//   x    [rows, columns], columns a multiple of 32
//   out  rows * columns / 32 activation groups, see activations.h
KERNEL void llmir_quantize_activations(const float* restrict x, size_t x_offset, uint8_t* restrict out,
                                       size_t out_offset, size_t rows, size_t columns, size_t workgroup,
                                       size_t rows_per_workgroup) {
  activation_group* groups_out = (activation_group*)(out + out_offset);
  size_t groups = columns / GROUP;
  size_t first = workgroup * rows_per_workgroup, end = min_size(rows, first + rows_per_workgroup);
  for (size_t row = first; row < end; ++row) {
    size_t stride;
    activation_group* record = groups_out + activation_index(rows, groups, row, &stride);
    const float* values = x + x_offset + row * columns;
    for (size_t g = 0; g < groups; ++g, values += GROUP, record += stride) quantize_group(values, record);
  }
}
