// Vectors of 16 lanes, the unit that all kernels are written in, whatever the width of the machine's registers.
//
// The types are the compiler's vector extensions, which lower to any instruction set; where an instruction does better
// than what the compiler would find (dot products of bytes, conversions of halves), it is named here and nowhere else.
#pragma once

#include "kernel.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

enum { LANES = 16 };

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
#if defined(__aarch64__)
typedef __fp16 h16x16 __attribute__((vector_size(32)));
#endif
typedef int8_t i8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// The same in memory, at any address.
typedef f32x16 f32x16_memory __attribute__((aligned(1), may_alias));
typedef u8x64 u8x64_memory __attribute__((aligned(1), may_alias));
typedef u16x16 u16x16_memory __attribute__((aligned(1), may_alias));
typedef i8x16 i8x16_memory __attribute__((aligned(1), may_alias));
typedef u8x16 u8x16_memory __attribute__((aligned(1), may_alias));
typedef uint32_t u32_memory __attribute__((aligned(1), may_alias));

INLINE f32x16 splat(float x) { return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE i32x16 splat_i32(int32_t x) { return (i32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE u8x64 splat_u8(uint8_t x) { return (u8x64)splat_i32((int32_t)(x * 0x01010101u)); }

INLINE f32x16 load_f32(const float* p) { return *(const f32x16_memory*)p; }
INLINE u8x64 load_u8(const uint8_t* p) { return *(const u8x64_memory*)p; }
INLINE void store_f32(float* p, f32x16 x) { *(f32x16_memory*)p = x; }

// The first `count` lanes; a whole store wherever it can be one.
INLINE void store_first_f32(float* p, f32x16 x, size_t count) {
  if (count >= LANES) {
    store_f32(p, x);
  } else {
    for (size_t i = 0; i < count; ++i) p[i] = x[i];
  }
}

// `a` where the mask is all ones, `b` where it is zero.
INLINE f32x16 select_f32(i32x16 mask, f32x16 a, f32x16 b) { return (f32x16)((mask & (i32x16)a) | (~mask & (i32x16)b)); }
INLINE i32x16 select_i32(i32x16 mask, i32x16 a, i32x16 b) { return (mask & a) | (~mask & b); }

// A NaN in `b` stays, one in `a` is dropped.
INLINE f32x16 max_f32(f32x16 a, f32x16 b) { return select_f32((i32x16)(a > b), a, b); }

INLINE i32x16 max_i32(i32x16 a, i32x16 b) { return select_i32((i32x16)(a > b), a, b); }

// Lanes 8, 4, 2 or 1 and on as lanes 0 and on: to halve what is left to reduce. The rest of the result means nothing.
#define UPPER_8(x) __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15)
#define UPPER_4(x) __builtin_shufflevector(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7)
#define UPPER_2(x) __builtin_shufflevector(x, x, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3)
#define UPPER_1(x) __builtin_shufflevector(x, x, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)

INLINE int32_t reduce_max_i32(i32x16 x) {
  x = max_i32(x, UPPER_8(x));
  x = max_i32(x, UPPER_4(x));
  x = max_i32(x, UPPER_2(x));
  x = max_i32(x, UPPER_1(x));
  return x[0];
}

INLINE int32_t reduce_add_i32(i32x16 x) {
  u32x16 sum = (u32x16)x;  // which may wrap around
  sum += UPPER_8(sum);
  sum += UPPER_4(sum);
  sum += UPPER_2(sum);
  sum += UPPER_1(sum);
  return (int32_t)sum[0];
}

INLINE float reduce_max_f32(f32x16 x) {
  x = max_f32(x, UPPER_8(x));
  x = max_f32(x, UPPER_4(x));
  x = max_f32(x, UPPER_2(x));
  x = max_f32(x, UPPER_1(x));
  return x[0];
}

INLINE float reduce_add_f32(f32x16 x) {
  x += UPPER_8(x);
  x += UPPER_4(x);
  x += UPPER_2(x);
  x += UPPER_1(x);
  return x[0];
}

INLINE f32x16 f32_from_i32(i32x16 x) { return __builtin_convertvector(x, f32x16); }
INLINE i32x16 i32_from_i8(i8x16 x) { return __builtin_convertvector(x, i32x16); }

// Halves. In software: moving the exponent makes them floats, but for denormals, which are integers times 2^-24. A
// denormal float must not appear on the way, as IREE has the processor flush those to zero.
INLINE f32x16 f32_from_f16(u16x16 x) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  union {
    u16x16 whole;
    __m128i part[2];
  } in = {x};
  union {
    __m256 part[2];
    f32x16 whole;
  } out;
  UNROLL for (int i = 0; i < 2; ++i) out.part[i] = _mm256_cvtph_ps(in.part[i]);
  return out.whole;
#elif defined(__aarch64__)
  return __builtin_convertvector((h16x16)x, f32x16);
#else
  i32x16 bits = __builtin_convertvector(x, i32x16);
  i32x16 sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  i32x16 special = (i32x16)(magnitude >= 0x7c00) & (112 << 23);  // infinities and NaN keep the largest exponent
  i32x16 normal = (magnitude << 13) + (112 << 23) + special;
  f32x16 denormal = f32_from_i32(magnitude) * 0x1p-24f;
  return (f32x16)(select_i32((i32x16)(magnitude < 0x400), (i32x16)denormal, normal) | sign);
#endif
}

INLINE f32x16 load_f16(const f16* p) { return f32_from_f16(*(const u16x16_memory*)p); }

INLINE f32x16 load_bf16(const bf16* p) {
  return (f32x16)(__builtin_convertvector(*(const u16x16_memory*)p, u32x16) << 16);
}

INLINE float f32_from_f16_scalar(f16 x) {
  uint32_t magnitude = x & 0x7fffu;
  union {
    float value;
    uint32_t bits;
  } out = {(float)magnitude * 0x1p-24f};
  if (magnitude >= 0x400) out.bits = (magnitude << 13) + ((magnitude < 0x7c00 ? 112u : 224u) << 23);
  out.bits |= (x & 0x8000u) << 16;
  return out.value;
}

// Rounds to the nearest half, ties to even; what is too large becomes infinite, a NaN stays one.
INLINE f16 f16_from_f32_scalar(float x) {
  union {
    float value;
    uint32_t bits;
  } in = {x};
  uint32_t sign = (in.bits >> 16) & 0x8000u, magnitude = in.bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (f16)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (f16)(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Denormal: adding 0.5 leaves the half's bits at the end of the sum, rounded by the addition.
    union {
      float value;
      uint32_t bits;
    } sum = {.bits = magnitude};
    sum.value += 0.5f;
    return (f16)(sign | (sum.bits - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return (f16)(sign | (rounded >> 13));
}

INLINE void store_f16(f16* p, f32x16 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  union {
    f32x16 whole;
    __m256 part[2];
  } in = {x};
  UNROLL for (int i = 0; i < 2; ++i)
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph(in.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  *(u16x16_memory*)p = (u16x16)__builtin_convertvector(x, h16x16);
#else
  for (int i = 0; i < LANES; ++i) p[i] = f16_from_f32_scalar(x[i]);
#endif
}

// All stores before are done and no load through `*p` has begun. Left alone, the compiler starts the loads of all rows
// of an unrolled loop at once, runs out of registers and spills them.
#define FINISH_BEFORE_LOADS(p) __asm__ volatile("" : "+r"(p) : : "memory")

// Four bytes in every lane.
INLINE i8x64 splat_4i8(const int8_t* p) { return (i8x64)splat_i32((int32_t)*(const u32_memory*)p); }

// Bits `shift` and up of every byte, cut to `mask`.
INLINE u8x64 bits_u8(u8x64 x, int shift, uint8_t mask) {
#if defined(__aarch64__)
  return (x >> shift) & splat_u8(mask);
#else
  // No instruction shifts bytes; the neighbour's bits that a wider shift lets in are masked away.
  return (u8x64)((u16x32)x >> shift) & splat_u8(mask);
#endif
}

// e^x, to within 2 ulp; below -87 the smallest normal number stands in. NaN stays.
// Source of the polynomial: expf of the Cephes library, S. Moshier.
INLINE f32x16 exp_f32(f32x16 x) {
  x = select_f32((i32x16)(x < splat(-87.0f)), splat(-87.0f), x);
  x = select_f32((i32x16)(x > splat(88.0f)), splat(88.0f), x);
  const float to_integer = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  f32x16 shifted = x * 1.44269504f + to_integer;
  f32x16 n = shifted - to_integer;
  f32x16 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  u32x16 power = ((u32x16)shifted + 127u) << 23;
  return p * (f32x16)power;
}

INLINE f32x16 tanh_f32(f32x16 x) { return 1.0f - 2.0f / (exp_f32(x + x) + 1.0f); }
