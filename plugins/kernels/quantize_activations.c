// float32 rows to quantised activations: done once, whatever the number of matmuls that read the result.
//
// Where a norm comes before them, it is computed on the way. All kernels take rows workgroup * rows_per_workgroup and
// on.
#include "quantize.h"

typedef struct {
  activation_group* records;
  size_t rows, groups;
} activations;

// 1 / sqrt of the mean square of a row, which is read from `x` and, unless `residual` is null, summed with it and
// written to `sum`.
INLINE float inverse_rms(const float* x, const float* residual, float* sum, size_t columns, float epsilon) {
  f32x16 squares[2] = {splat(0.0f), splat(0.0f)};
  for (size_t k = 0; k < columns; k += GROUP) {
    values32 v = load_values(x + k);
    if (residual) {
      values32 r = load_values(residual + k);
      v = (values32){v.low + r.low, v.high + r.high};
      store_f32(sum + k, v.low);
      store_f32(sum + k + LANES, v.high);
    }
    squares[0] += v.low * v.low;
    squares[1] += v.high * v.high;
  }
  return 1.0f / __builtin_sqrtf(reduce_add_f32(squares[0] + squares[1]) / (float)columns + epsilon);
}

// 32 columns of x * factor * weight; a null weight leaves x as it is.
INLINE values32 weigh(const float* x, float factor, const float* weight, size_t column) {
  values32 v = load_values(x + column);
  if (!weight) return v;
  values32 w = load_values(weight + column);
  return (values32){v.low * factor * w.low, v.high * factor * w.high};
}

// The reach from which on a group gets a second record: what rounding does to a row's product with a weight grows with
// the square of a group's reach, so that the groups with outliers make most of it. That is 1.5 times the geometric mean
// over the groups that are finite and not zero, which outliers hardly move. The bits of a float are close to its
// logarithm to base 2, times 2^23.
INLINE float_bits reach_of_outliers(const float* x, float factor, const float* weight, size_t groups) {
  const float_bits smallest = {.value = SMALLEST_REACH};
  const int32_t infinity = 0x7f800000;
  const int32_t half_octave = 0x4ae000;  // log2(1.5) * 2^23
  int64_t sum = 0, count = 0;
  for (size_t g = 0; g < groups; ++g) {
    int32_t bits = reach_of(weigh(x, factor, weight, g * GROUP)).bits;
    if (bits < smallest.bits || bits >= infinity) continue;
    sum += bits;
    ++count;
  }
  return (float_bits){count ? (int32_t)(sum / count) + half_octave : 0};
}

INLINE void quantize_row(const float* x, float factor, const float* weight, const activations* out, size_t row) {
  size_t stride, distance = rest_distance(out->rows, out->groups);
  activation_group* record = out->records + activation_index(out->rows, out->groups, row, &stride);
  float_bits outlier = reach_of_outliers(x, factor, weight, out->groups);
  for (size_t g = 0; g < out->groups; ++g, record += stride) {
    values32 v = weigh(x, factor, weight, g * GROUP);
    if (reach_of(v).bits > outlier.bits)
      quantize_group_twice(v, distance, record);
    else
      quantize_group(v, record);
  }
}

// Quantises x.
//   x        [rows, columns], columns a multiple of 32
//   out      records, see activations.h
KERNEL void llmir_quantize_activations(const float* restrict x, size_t x_offset, uint8_t* restrict out,
                                       size_t out_offset, size_t rows, size_t columns, size_t workgroup,
                                       size_t rows_per_workgroup) {
  const activations to = {(activation_group*)(out + out_offset), rows, columns / GROUP};
  size_t first = workgroup * rows_per_workgroup, end = min_size(rows, first + rows_per_workgroup);
  for (size_t row = first; row < end; ++row) quantize_row(x + x_offset + row * columns, 1.0f, NULL, &to, row);
}

// Quantises x / sqrt(mean(x^2) + epsilon) * weight, the mean over a row.
//   x        [rows, columns], columns a multiple of 32
//   weight   [columns]
//   out      records, see activations.h
KERNEL void llmir_norm_quantize(const float* restrict x, size_t x_offset, const float* restrict weight,
                                size_t weight_offset, uint8_t* restrict out, size_t out_offset, size_t rows,
                                size_t columns, float epsilon, size_t workgroup,
                                size_t rows_per_workgroup) {
  const activations to = {(activation_group*)(out + out_offset), rows, columns / GROUP};
  size_t first = workgroup * rows_per_workgroup, end = min_size(rows, first + rows_per_workgroup);
  for (size_t row = first; row < end; ++row) {
    const float* values = x + x_offset + row * columns;
    float factor = inverse_rms(values, NULL, NULL, columns, epsilon);
    quantize_row(values, factor, weight + weight_offset, &to, row);
  }
}

// The same for sum = x + residual, which is stored.
//   x, residual, sum  [rows, columns], columns a multiple of 32
//   weight            [columns]
//   out               records, see activations.h
KERNEL void llmir_add_norm_quantize(const float* restrict x, size_t x_offset, const float* restrict residual,
                                    size_t residual_offset, const float* restrict weight, size_t weight_offset,
                                    float* restrict sum, size_t sum_offset, uint8_t* restrict out, size_t out_offset,
                                    size_t rows, size_t columns, float epsilon, size_t workgroup,
                                    size_t rows_per_workgroup) {
  const activations to = {(activation_group*)(out + out_offset), rows, columns / GROUP};
  size_t first = workgroup * rows_per_workgroup, end = min_size(rows, first + rows_per_workgroup);
  for (size_t row = first; row < end; ++row) {
    float* values = sum + sum_offset + row * columns;
    const float *of_x = x + x_offset + row * columns, *of_residual = residual + residual_offset + row * columns;
    float factor = inverse_rms(of_x, of_residual, values, columns, epsilon);
    quantize_row(values, factor, weight + weight_offset, &to, row);
  }
}
