// Quantised weights of 16 rows, a group of 32 columns at a time, from planes in layout tile16 (params/layouts.py).
//
// Whatever the format, a weight is scale * (code - zero point) + minimum, with a code that has no sign.
#pragma once

#include "activations.h"
#include "dots.h"

enum { STEPS = 8 };                  // of 4 weights each in a group
enum { PREFETCH_BYTES = 4 << 10 };   // of codes: how far ahead

typedef enum { Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K } format;

// The planes of a matrix; those that a format lacks are null. A block is a group, and 8 groups in K-quants.
typedef struct {
  const f16* d;           // [tiles, blocks, 16]
  const f16* m;           // [tiles, blocks, 16]
  const uint8_t* scales;  // [tiles, blocks, 12 or 16, 16]
  const uint8_t* codes;   // [tiles, groups, 4 or 8, 16, 4]: two nibbles or one byte
  const uint8_t* high;    // [tiles, groups, 1 or 2, 16, 4]: eight times one bit or four times two
} weight_planes;

// One group of 32 weights of 16 rows, or part of it while it is unpacked. The halves differ in q6_k only.
typedef struct {
  union {
    u8x64 codes[STEPS];
    byte_codes bytes[STEPS];  // of q8_0
  };
  f32x16 scale[2];
  f32x16 minimum;  // / CODE_SUM_FACTOR
} weight_group;

INLINE int zero_point(const format f) {
  return f == Q4_0 ? 8 : f == Q8_0 ? BYTE_ZERO_POINT : f == Q6_K ? 32 : 0;
}
INLINE int has_minimum(const format f) { return f == Q4_1 || f == Q4_K || f == Q5_K; }
INLINE size_t groups_of_block(const format f) { return f == Q4_K || f == Q5_K || f == Q6_K ? 8 : 1; }
INLINE int halves(const format f) { return f == Q6_K ? 2 : 1; }  // that have a scale of their own

// Bytes of a group.
INLINE size_t code_bytes(const format f) { return f == Q8_0 ? 512 : 256; }
INLINE size_t high_bytes(const format f) { return f == Q5_K ? 64 : f == Q6_K ? 128 : 0; }

// A step of the dot product with activations.
INLINE void add_codes(const format f, dot_sums* sums, const int step, const weight_group* w, i8x64 activations) {
  if (f == Q8_0) {
    add_step_of_bytes(sums, w->bytes[step], activations);
  } else {
    add_step(sums, step, w->codes[step], f == Q5_K ? 31 : f == Q6_K ? 63 : 15, activations);
  }
}

INLINE u8x64 high_bits(const format f, const uint8_t* high, int step) {
  if (f == Q5_K) {
    u8x64 bits = load_u8(high);
    return step < 4 ? (u8x64)((u16x32)bits << (4 - step)) & splat_u8(16) : bits_u8(bits, step - 4, 16);
  }
  u8x64 bits = load_u8(high + 64 * (step / 4));
  return step % 4 < 2 ? (u8x64)((u16x32)bits << (4 - 2 * (step % 4))) & splat_u8(48)
                      : bits_u8(bits, 2 * (step % 4) - 4, 48);
}

// Group `index` of all tiles' groups, step by step.
INLINE void unpack_step(const format f, const weight_planes* p, size_t index, const int step, weight_group* out) {
  const uint8_t* codes = p->codes + index * code_bytes(f);
  if (f == Q8_0) {
    out->bytes[step] = load_byte_codes(codes + 64 * step);
  } else {
    out->codes[step] = bits_u8(load_u8(codes + 64 * (step / 2)), 4 * (step % 2), 15);
    if (high_bytes(f)) out->codes[step] |= high_bits(f, p->high + index * high_bytes(f), step);
  }
}

INLINE f32x16 f32_from_u8(u8x16 x) { return f32_from_i32(__builtin_convertvector(x, i32x16)); }

// Scale and minimum of group g of a block: 6 bits each, of the last four groups in two parts.
INLINE void unpack_six_bit_scales(const uint8_t* scales, size_t g, f32x16 d, f32x16 dmin, weight_group* out) {
  u8x16 scale, minimum, high = *(const u8x16_memory*)(scales + (g + 4) * LANES);
  if (g < 4) {
    scale = *(const u8x16_memory*)(scales + g * LANES) & 63;
    minimum = high & 63;
  } else {
    scale = (high & 15) | (*(const u8x16_memory*)(scales + (g - 4) * LANES) >> 6 << 4);
    minimum = (high >> 4) | (*(const u8x16_memory*)(scales + g * LANES) >> 6 << 4);
  }
  out->scale[0] = d * f32_from_u8(scale);
  out->minimum = -dmin * f32_from_u8(minimum);
}

// What is left to know once all steps are unpacked.
INLINE void unpack_scales(const format f, const weight_planes* p, size_t index, weight_group* out) {
  size_t block = index / groups_of_block(f);
  f32x16 d = load_f16(p->d + block * LANES);
  if (f == Q4_K || f == Q5_K) {
    unpack_six_bit_scales(p->scales + block * 12 * LANES, index % 8, d, load_f16(p->m + block * LANES), out);
  } else if (f == Q6_K) {
    const int8_t* scales = (const int8_t*)p->scales + index * 2 * LANES;
    UNROLL for (int half = 0; half < 2; ++half) out->scale[half] =
        d * f32_from_i32(i32_from_i8(*(const i8x16_memory*)(scales + half * LANES)));
  } else {
    out->scale[0] = d;
    if (f == Q4_1) out->minimum = load_f16(p->m + block * LANES);
  }
  if (has_minimum(f)) out->minimum *= 1.0f / CODE_SUM_FACTOR;
}

// Into the first cache, which is shorter a way, but waits for few lines at a time: too few to hide how long memory
// takes from those who do much with each. Or into the second one.
INLINE void prefetch_line(const void* line, const int is_near) {
  if (is_near)
    __builtin_prefetch(line, 0, 3);
  else
    __builtin_prefetch(line, 0, 2);
}

// The hardware's own prefetch stops at the end of a page. Where the tile ends, tile `next` follows.
INLINE void prefetch(const format f, const weight_planes* p, size_t tile, size_t next, size_t groups, size_t g,
                     const int is_near) {
  size_t ahead = g + PREFETCH_BYTES / code_bytes(f);
  size_t index = (ahead < groups ? tile : next - 1) * groups + ahead;
  UNROLL for (size_t line = 0; line < code_bytes(f); line += 64)
      prefetch_line(p->codes + index * code_bytes(f) + line, is_near);
  UNROLL for (size_t line = 0; line < high_bytes(f); line += 64)
      prefetch_line(p->high + index * high_bytes(f) + line, is_near);
  if (f == Q6_K) prefetch_line(p->scales + index * 2 * LANES, is_near);
  if (f == Q4_K || f == Q5_K) prefetch_line(p->scales + index * 24, is_near);
  prefetch_line(p->d + index / groups_of_block(f) * LANES, is_near);
  if (has_minimum(f)) prefetch_line(p->m + index / groups_of_block(f) * LANES, is_near);
}

// The planes of a kernel's matrix as its arguments, and as they are read.
#define Q4_0_ARGUMENTS const f16 *restrict d, size_t d_offset, const uint8_t *restrict qs, size_t qs_offset
#define Q4_0_PLANES {.d = d + d_offset, .codes = qs + qs_offset}

#define Q4_1_ARGUMENTS                                                                                         \
  const f16 *restrict d, size_t d_offset, const f16 *restrict m, size_t m_offset, const uint8_t *restrict qs,  \
      size_t qs_offset
#define Q4_1_PLANES {.d = d + d_offset, .m = m + m_offset, .codes = qs + qs_offset}

#define Q8_0_ARGUMENTS const f16 *restrict d, size_t d_offset, const int8_t *restrict qs, size_t qs_offset
#define Q8_0_PLANES {.d = d + d_offset, .codes = (const uint8_t*)qs + qs_offset}

#define Q4_K_ARGUMENTS                                                                                         \
  const f16 *restrict d, size_t d_offset, const f16 *restrict dmin, size_t dmin_offset,                        \
      const uint8_t *restrict scales, size_t scales_offset, const uint8_t *restrict qs, size_t qs_offset
#define Q4_K_PLANES                                                                                            \
  {.d = d + d_offset, .m = dmin + dmin_offset, .scales = scales + scales_offset, .codes = qs + qs_offset}

#define Q5_K_ARGUMENTS                                                                                         \
  const f16 *restrict d, size_t d_offset, const f16 *restrict dmin, size_t dmin_offset,                        \
      const uint8_t *restrict scales, size_t scales_offset, const uint8_t *restrict qh, size_t qh_offset,      \
      const uint8_t *restrict qs, size_t qs_offset
#define Q5_K_PLANES                                                                                            \
  {.d = d + d_offset,                                                                                          \
   .m = dmin + dmin_offset,                                                                                    \
   .scales = scales + scales_offset,                                                                           \
   .codes = qs + qs_offset,                                                                                    \
   .high = qh + qh_offset}

#define Q6_K_ARGUMENTS                                                                                         \
  const uint8_t *restrict ql, size_t ql_offset, const uint8_t *restrict qh, size_t qh_offset,                  \
      const int8_t *restrict scales, size_t scales_offset, const f16 *restrict d, size_t d_offset
#define Q6_K_PLANES                                                                                            \
  {.d = d + d_offset,                                                                                          \
   .scales = (const uint8_t*)scales + scales_offset,                                                           \
   .codes = ql + ql_offset,                                                                                    \
   .high = qh + qh_offset}
