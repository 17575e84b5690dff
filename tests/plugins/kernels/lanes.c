// Functions of lanes.h and dots.h as kernels of their own, for what the kernels alone would not show: each instruction set has its
// own instructions for them.
#include "../../../plugins/kernels/dots.h"

// sums int32 [count, 16] += the products of a uint8 [count, 8, 16, 4] and b int8 of the same shape: dot products of eight
// steps, with a of at most `most`.
#define DEFINE_DOT(most)                                                                                              \
  KERNEL void lanes_dot_##most(float* sums, size_t sums_offset, const uint8_t* a, size_t a_offset, const uint8_t* b,  \
                               size_t b_offset, size_t count) {                                                       \
    for (size_t i = 0; i < count; ++i) {                                                                              \
      float* sum = sums + sums_offset + i * LANES;                                                                    \
      dot_sums dot = start_sums((i32x16)load_f32(sum));                                                               \
      UNROLL for (int step = 0; step < 8; ++step) {                                                                   \
        size_t at = (i * 8 + (size_t)step) * 64;                                                                      \
        add_step(&dot, step, load_u8(a + a_offset + at), most, (i8x64)load_u8(b + b_offset + at));                    \
      }                                                                                                               \
      store_f32(sum, (f32x16)dot.wide);                                                                               \
    }                                                                                                                 \
  }
DEFINE_DOT(15)
DEFINE_DOT(31)
DEFINE_DOT(63)
DEFINE_DOT(127)

// The same with a int8, of any value.
KERNEL void lanes_dot_bytes(float* sums, size_t sums_offset, const uint8_t* a, size_t a_offset, const uint8_t* b,
                            size_t b_offset, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    float* sum = sums + sums_offset + i * LANES;
    dot_sums dot = start_sums((i32x16)load_f32(sum));
    UNROLL for (int step = 0; step < 8; ++step) {
      size_t at = (i * 8 + (size_t)step) * 64;
      byte_codes codes = load_byte_codes(a + a_offset + at);
      i8x64 x = (i8x64)load_u8(b + b_offset + at);
      add_step_of_bytes(&dot, codes, x);
      if (BYTE_ZERO_POINT) {
        i32x16 excess = splat_i32(0);
        for (int byte = 0; byte < 64; ++byte) excess[byte / 4] += BYTE_ZERO_POINT * x[byte];
        dot.wide -= excess;
      }
    }
    store_f32(sum, (f32x16)dot.wide);
  }
}

// wide float32 [count] from narrow, halves; and back, in two ways: 16 at a time and one by one.
KERNEL void lanes_widen(const f16* narrow, size_t narrow_offset, float* wide, size_t wide_offset, float* wide_by_one,
                        size_t wide_by_one_offset, size_t count) {
  for (size_t i = 0; i < count; i += LANES) store_f32(wide + wide_offset + i, load_f16(narrow + narrow_offset + i));
  for (size_t i = 0; i < count; ++i) wide_by_one[wide_by_one_offset + i] = f32_from_f16_scalar(narrow[narrow_offset + i]);
}

KERNEL void lanes_narrow(const float* wide, size_t wide_offset, f16* narrow, size_t narrow_offset, f16* narrow_by_one,
                         size_t narrow_by_one_offset, size_t count) {
  for (size_t i = 0; i < count; i += LANES) store_f16(narrow + narrow_offset + i, load_f32(wide + wide_offset + i));
  for (size_t i = 0; i < count; ++i)
    narrow_by_one[narrow_by_one_offset + i] = f16_from_f32_scalar(wide[wide_offset + i]);
}

// Of x float32 [16]: maximum and sum, and the same of its bits taken for integers, of which the sum is of their upper
// 24.
KERNEL void lanes_reduce(const float* x, size_t x_offset, float* floats, size_t floats_offset, int32_t* integers,
                         size_t integers_offset) {
  f32x16 row = load_f32(x + x_offset);
  floats[floats_offset] = reduce_max_f32(row);
  floats[floats_offset + 1] = reduce_add_f32(row);
  integers[integers_offset] = reduce_max_i32((i32x16)row);
  integers[integers_offset + 1] = reduce_add_i32((i32x16)row >> 8);
}

// e^x and tanh(x) of float32 [count, 16].
KERNEL void lanes_functions(const float* x, size_t x_offset, float* exp, size_t exp_offset, float* tanh,
                            size_t tanh_offset, size_t count) {
  for (size_t i = 0; i < count * LANES; i += LANES) {
    store_f32(exp + exp_offset + i, exp_f32(load_f32(x + x_offset + i)));
    store_f32(tanh + tanh_offset + i, tanh_f32(load_f32(x + x_offset + i)));
  }
}

// Weighs every argument differently, so that none can stand in for another: more of them than there are registers.
KERNEL void lanes_arguments(int32_t* out, size_t out_offset, const int32_t* a, size_t a_offset, const int32_t* b,
                            size_t b_offset, size_t c, float d, size_t e, size_t f, float g, size_t h, size_t i) {
  float sum = d * 64.0f + g * 128.0f;
  out[out_offset] = a[a_offset] + 2 * b[b_offset] + (int32_t)(4 * c + 8 * e + 16 * f + 32 * h + 256 * i) + (int32_t)sum;
}
