// What the machine gives at best, for others to be measured by: reading memory, and multiplying bytes or floats in
// registers.
#include "dots.h"

enum { READ_STREAMS = 4 };       // that a workgroup reads side by side
enum { PREFETCH_VECTORS = 16 };  // how far ahead
enum { BYTES = 64 };             // of a vector

enum { OPERANDS = 4 };  // vectors on each side of the products

// A square of products at a time: as many as keep the units busy while each waits for its sum, if registers hold them.
#if defined(__AVX512F__)
enum { SIDE = 4 };
#else
enum { SIDE = 2 };
#endif

// Reads vectors workgroup * vectors_per_workgroup and on, once.
//   in   uint8 [vectors, 64]
//   out  int32 [workgroups]: 1 if the workgroup's share has a byte that is not zero; what was read must have a use
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

// Multiplies the same bytes over and over, every vector of a with every vector of b, as weights of 4 bits are.
//   a       uint8 [4, 64], at most 15
//   b       int8 [4, 64]
//   out     int32 [workgroups, 16]: the dot products of bytes, four to a lane, added up
//   rounds  that each workgroup does, of 32 products of vectors: each of them twice, for dot products of 8 steps
KERNEL void llmir_multiply_bytes(const uint8_t* restrict a, size_t a_offset, const int8_t* restrict b, size_t b_offset,
                                 int32_t* restrict out, size_t out_offset, size_t rounds, size_t workgroup) {
  enum { MOST = 15, SQUARES = OPERANDS * OPERANDS / (SIDE * SIDE) };
  const uint8_t *left = a + a_offset, *right = (const uint8_t*)(b + b_offset);
  dot_sums sums[SIDE][SIDE];
  UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) sums[i][j] = start_sums(splat_i32(0));
  for (size_t round = 0; round < rounds; ++round) {
    UNROLL for (int step = 0; step < 2 * SQUARES; ++step) {
      const int square = step % SQUARES;
      const int row = square / (OPERANDS / SIDE) * SIDE, column = square % (OPERANDS / SIDE) * SIDE;
      FINISH_BEFORE_LOADS(left);
      FINISH_BEFORE_LOADS(right);
      i8x64 y[SIDE];
      UNROLL for (int j = 0; j < SIDE; ++j) y[j] = (i8x64)load_u8(right + (column + j) * BYTES);
      UNROLL for (int i = 0; i < SIDE; ++i) {
        u8x64 x = load_u8(left + (row + i) * BYTES);
        UNROLL for (int j = 0; j < SIDE; ++j) add_step(&sums[i][j], step, x, MOST, y[j]);
      }
    }
  }
  i32x16 total = splat_i32(0);
  UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) total += sums[i][j].wide;
  store_f32((float*)(out + out_offset) + workgroup * LANES, (f32x16)total);
}

// The same with floats.
//   a, b    float32 [4, 16]
//   out     float32 [workgroups, 16]: the products, added up
KERNEL void llmir_multiply_floats(const float* restrict a, size_t a_offset, const float* restrict b, size_t b_offset,
                                  float* restrict out, size_t out_offset, size_t rounds, size_t workgroup) {
  const float *left = a + a_offset, *right = b + b_offset;
  f32x16 sums[SIDE][SIDE];
  UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) sums[i][j] = splat(0.0f);
  for (size_t round = 0; round < rounds; ++round) {
    UNROLL for (int square = 0; square < OPERANDS * OPERANDS; square += SIDE * SIDE) {
      const int row = square / OPERANDS / SIDE * SIDE, column = square / SIDE % OPERANDS;
      FINISH_BEFORE_LOADS(left);
      FINISH_BEFORE_LOADS(right);
      f32x16 y[SIDE];
      UNROLL for (int j = 0; j < SIDE; ++j) y[j] = load_f32(right + (column + j) * LANES);
      UNROLL for (int i = 0; i < SIDE; ++i) {
        f32x16 x = load_f32(left + (row + i) * LANES);
        UNROLL for (int j = 0; j < SIDE; ++j) sums[i][j] += x * y[j];
      }
    }
  }
  f32x16 total = splat(0.0f);
  UNROLL for (int i = 0; i < SIDE; ++i) UNROLL for (int j = 0; j < SIDE; ++j) total += sums[i][j];
  store_f32(out + out_offset + workgroup * LANES, total);
}
