// What the machine gives at best, for others to be measured by: reading memory, and multiplying bytes in registers.
#include "lanes.h"

enum { READ_STREAMS = 4 };       // that a workgroup reads side by side
enum { PREFETCH_VECTORS = 16 };  // how far ahead
enum { BYTES = 64 };             // of a vector

// As many products as keep the units for them busy while each waits for its sum, and as few as fit the registers.
#if defined(__AVX512F__)
enum { SIDE = 4 };
#else
enum { SIDE = 2 };
#endif

// Reads vectors workgroup * vectors_per_workgroup and on, once.
//   in   uint8 [vectors, 64]
//   out  int32 [workgroups]; 1 where a byte of the workgroup's share is not zero, which nobody wants to know
KERNEL void llmir_read_memory(const uint8_t* restrict in, size_t in_offset, int32_t* restrict out, size_t out_offset,
                              size_t vectors, size_t workgroup, size_t vectors_per_workgroup) {
  size_t first = workgroup * vectors_per_workgroup, end = min_size(vectors, first + vectors_per_workgroup);
  const uint8_t* p = in + in_offset + first * BYTES;
  size_t stream = (end - first) / READ_STREAMS;
  u8x64 seen[READ_STREAMS] = {{0}};
  for (size_t i = 0; i < stream; ++i) {
    UNROLL for (int s = 0; s < READ_STREAMS; ++s) {
      const uint8_t* at = p + ((size_t)s * stream + i) * BYTES;
      __builtin_prefetch(at + PREFETCH_VECTORS * BYTES);
      seen[s] |= load_u8(at);
    }
  }
  for (size_t i = stream * READ_STREAMS; i < end - first; ++i) seen[0] |= load_u8(p + i * BYTES);
  UNROLL for (int s = 1; s < READ_STREAMS; ++s) seen[0] |= seen[s];
  out[out_offset + workgroup] = reduce_max_i32((i32x16)((i32x16)seen[0] != 0) & 1);
}

// Multiplies the same bytes over and over, every vector of a with every vector of b, and each product has a sum of its
// own: nothing waits, and little is loaded.
//   a, b  uint8 and int8 [4, 64]
//   out   int32 [workgroups, 16]: the sums, added up
//   rounds  times that each workgroup does 16 dot products of vectors
KERNEL void llmir_multiply_bytes(const uint8_t* restrict a, size_t a_offset, const int8_t* restrict b, size_t b_offset,
                                 int32_t* restrict out, size_t out_offset, size_t rounds, size_t workgroup) {
  const uint8_t* left = a + a_offset;
  const uint8_t* right = (const uint8_t*)b + b_offset;
  i32x16 sums[SIDE][SIDE];
  UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) sums[i][j] = splat_i32(0);
  for (size_t round = 0; round < rounds * (16 / SIDE / SIDE); ++round) {
    FINISH_BEFORE_LOADS(left);
    FINISH_BEFORE_LOADS(right);
    u8x64 x[SIDE];
    i8x64 y[SIDE];
    UNROLL for (int i = 0; i < SIDE; ++i) {
      x[i] = load_u8(left + i * BYTES);
      y[i] = (i8x64)load_u8(right + i * BYTES);
    }
    UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) {
      sums[i][j] = dot_u8_i8(sums[i][j], x[i], y[j]);
    }
  }
  i32x16 total = splat_i32(0);
  UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) total += sums[i][j];
  store_f32((float*)out + out_offset + workgroup * LANES, (f32x16)total);
}
