// silu(x * gate^T) * (x * up^T), quantised: the first half of a gated feed-forward layer, whose result the second half
// takes as it is.
#include "products.h"
#include "quantize.h"

INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp_f32(-x)); }

// Groups that are compared with each other to find outliers, and by which factor, 1.2, these stand out. Of a row's other
// groups, other workgroups know.
enum { COMPARED = 4, FACTOR = 1 << 21 };

// All rows for the workgroup's groups of 32 columns: two tiles of gates and the two that go with them.
INLINE void multiply(const format f, const matmul* m, activation_group* out, size_t first, size_t end) {
  size_t groups = m->columns / GROUP, distance = rest_distance(m->rows, groups);
  for (size_t row = 0; row < m->rows; row += BLOCK_ROWS) {
    size_t rows = min_size(BLOCK_ROWS, m->rows - row), stride;
    activation_group* records = out + activation_index(m->rows, groups, row, &stride);
    for (size_t group = first; group < end; ++group) {
      tile_sums sums[2];  // of gates, and of what they gate
      const size_t tile[3] = {2 * group, 2 * (groups + group), 2 * group + 2};
      for (int part = 0; part < 2; ++part)
        multiply_block(f, m, tile[part], 4 * groups - 1, tile[part + 1], row, sums[part]);
      for (size_t r = 0; r < rows; ++r) {
        values32 gated = {silu(sums[0][r][0]) * sums[1][r][0], silu(sums[0][r][1]) * sums[1][r][1]};
        quantize_group_twice(gated, distance, records + group * stride + r);
      }

      // Of the second records, those of outliers stay.
      size_t compared = group % COMPARED + 1;
      if (compared < COMPARED && group + 1 < end) continue;
      for (size_t r = 0; r < rows; ++r) {
        activation_group* record = records + (group + 1 - compared) * stride + r;
        int32_t most_usual = most_usual_scale(record, stride, compared, FACTOR);
        for (size_t g = 0; g < compared; ++g, record += stride) record->has_rest = is_outlier(record, most_usual);
      }
    }
  }
}

// Arguments of all kernels.
//   the planes of a matrix of 2 * columns rows, first the gates and then what they are multiplied with, in the order of
//            the format and in layout tile16
//   x        quantised activations [rows, depth], see activations.h
//   out      quantised activations [rows, columns]
//   columns  of the result, a multiple of 32
//   depth    columns of x and of the matrix, a whole number of blocks
#define DEFINE_KERNEL(name, FORMAT)                                                                                 \
  KERNEL void llmir_gated_matmul_##name(FORMAT##_ARGUMENTS, const uint8_t* restrict x, size_t x_offset,             \
                                        uint8_t* restrict out, size_t out_offset, size_t rows, size_t columns,      \
                                        size_t depth, size_t workgroup, size_t workgroups) {                        \
    const matmul call = {FORMAT##_PLANES, (const activation_group*)(x + x_offset), rows, columns, depth / GROUP};   \
    size_t groups = columns / GROUP, units = ceil_div(groups, COMPARED);                                            \
    size_t first = COMPARED * first_unit(units, workgroup, workgroups);                                             \
    size_t end = min_size(groups, COMPARED * first_unit(units, workgroup + 1, workgroups));                         \
    multiply(FORMAT, &call, (activation_group*)(out + out_offset), first, end);                                     \
  }

DEFINE_KERNEL(q4_0, Q4_0)
DEFINE_KERNEL(q4_1, Q4_1)
DEFINE_KERNEL(q8_0, Q8_0)
DEFINE_KERNEL(q4_k, Q4_K)
DEFINE_KERNEL(q5_k, Q5_K)
DEFINE_KERNEL(q6_k, Q6_K)
