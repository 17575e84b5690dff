// Dot products of bytes: steps of four products to a lane, added up exactly, each in the instructions that suit the set.
//
// Where one instruction does a step, sums are 32 bits wide from the start. AVX2 has none: two products are added to 16
// bits by one instruction and widened by another, so what is known to stay small is added up before it is widened.
#pragma once

#include "lanes.h"

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#define NARROW_SUMS
#endif

// What codes of 8 bits are larger than the signed bytes that they stand for: where only one side of a product may have a
// sign, it is that of the activations.
#if defined(__AVX512VNNI__)
enum { BYTE_ZERO_POINT = 128 };
#else
enum { BYTE_ZERO_POINT = 0 };
#endif

// A dot product on its way.
typedef struct {
  i32x16 wide;
#if defined(NARROW_SUMS)
  i16x32 narrow;
#endif
} dot_sums;

INLINE dot_sums start_sums(i32x16 start) { return (dot_sums){.wide = start}; }

#if defined(NARROW_SUMS)
typedef union {
  u8x64 u8;
  i8x64 i8;
  i16x32 i16;
  i32x16 i32;
  __m256i part[2];
} parts;

// a[0] b[0] + a[1] b[1] and a[2] b[2] + a[3] b[3] in every lane, of which none may leave 16 bits.
INLINE i16x32 multiply_pairs(u8x64 a, i8x64 b) {
  parts as = {.u8 = a}, bs = {.i8 = b}, out;
  UNROLL for (int i = 0; i < 2; ++i) out.part[i] = _mm256_maddubs_epi16(as.part[i], bs.part[i]);
  return out.i16;
}

// The same sums, known to nobody. Left alone, the compiler adds up those of all steps in an order of its own, for which
// there are too few registers.
INLINE i16x32 finish(i16x32 sums) {
  parts all = {.i16 = sums};
  UNROLL for (int i = 0; i < 2; ++i) __asm__("" : "+x"(all.part[i]));
  return all.i16;
}

INLINE i32x16 add_pairs(i16x32 sums) {
  parts in = {.i16 = sums}, out;
  UNROLL for (int i = 0; i < 2; ++i) out.part[i] = _mm256_madd_epi16(in.part[i], _mm256_set1_epi16(1));
  return out.i32;
}

// -128 has a magnitude as well, since that has no sign.
INLINE u8x64 magnitudes_of(i8x64 x) {
  parts in = {.i8 = x}, out;
  UNROLL for (int i = 0; i < 2; ++i) out.part[i] = _mm256_abs_epi8(in.part[i]);
  return out.u8;
}

// x, above -128, with the sign of `sign` put on its own.
INLINE i8x64 apply_sign(i8x64 x, i8x64 sign) {
  parts xs = {.i8 = x}, signs = {.i8 = sign}, out;
  UNROLL for (int i = 0; i < 2; ++i) out.part[i] = _mm256_sign_epi8(xs.part[i], signs.part[i]);
  return out.i8;
}
#elif defined(__AVX512VNNI__)
INLINE i32x16 dot_u8_i8(i32x16 sum, u8x64 a, i8x64 b) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef union {
  i8x64 i8;
  i32x16 i32;
  int8x16_t i8_part[4];
  int32x4_t i32_part[4];
} parts;

INLINE i32x16 dot_i8_i8(i32x16 sum, i8x64 a, i8x64 b) {
  parts as = {.i8 = a}, bs = {.i8 = b}, out = {.i32 = sum};
  UNROLL for (int i = 0; i < 4; ++i) out.i32_part[i] = vdotq_s32(out.i32_part[i], as.i8_part[i], bs.i8_part[i]);
  return out.i32;
}
#else
// Even and odd bytes apart. A product of two bytes fits 16 bits; their sums do not.
INLINE i32x16 dot_i8_i8(i32x16 sum, i8x64 a, i8x64 b) {
  i16x32 even_a = (i16x32)((u16x32)a << 8) >> 8, odd_a = (i16x32)a >> 8;
  i16x32 even_b = (i16x32)((u16x32)b << 8) >> 8, odd_b = (i16x32)b >> 8;
  i16x32 even = even_a * even_b, odd = odd_a * odd_b;
  return sum + ((i32x16)((u32x16)even << 16) >> 16) + ((i32x16)even >> 16) +
         ((i32x16)((u32x16)odd << 16) >> 16) + ((i32x16)odd >> 16);
}
#endif

// The most steps of products of codes up to `most` with any bytes whose sums fit 16 bits; dot products are multiples.
INLINE int narrow_steps(const int most) { return 32767 / (2 * 128 * most); }

// Step `step`, with codes of at most `most`, which is below 128.
INLINE void add_step(dot_sums* sums, const int step, u8x64 codes, const int most, i8x64 x) {
#if defined(NARROW_SUMS)
  const int steps = narrow_steps(most);
  i16x32 products = multiply_pairs(codes, x);
  sums->narrow = finish(step % steps ? sums->narrow + products : products);
  if (step % steps == steps - 1) sums->wide += add_pairs(sums->narrow);
#elif defined(__AVX512VNNI__)
  (void)step, (void)most;
  sums->wide = dot_u8_i8(sums->wide, codes, x);
#else
  (void)step, (void)most;
  sums->wide = dot_i8_i8(sums->wide, (i8x64)codes, x);
#endif
}

// Codes of 8 bits, ready to be multiplied.
typedef struct {
  u8x64 codes;
#if defined(NARROW_SUMS)
  u8x64 magnitudes;
#endif
} byte_codes;

INLINE byte_codes load_byte_codes(const uint8_t* p) {
  u8x64 codes = load_u8(p);
#if defined(NARROW_SUMS)
  return (byte_codes){codes, magnitudes_of((i8x64)codes)};
#else
  return (byte_codes){codes ^ splat_u8(BYTE_ZERO_POINT)};
#endif
}

// A step with codes of 8 bits, and x above -128.
INLINE void add_step_of_bytes(dot_sums* sums, byte_codes w, i8x64 x) {
#if defined(NARROW_SUMS)
  sums->wide += add_pairs(multiply_pairs(w.magnitudes, apply_sign(x, (i8x64)w.codes)));
#elif defined(__AVX512VNNI__)
  sums->wide = dot_u8_i8(sums->wide, w.codes, x);
#else
  sums->wide = dot_i8_i8(sums->wide, (i8x64)w.codes, x);
#endif
}
