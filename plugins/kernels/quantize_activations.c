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

INLINE void quantize_row(const float* x, float factor, const float* weight, const activations* out, size_t row) {
  size_t stride, distance = rest_distance(out->rows, out->groups);
  activation_group* first = out->records + activation_index(out->rows, out->groups, row, &stride);
  activation_group* record = first;
  for (size_t g = 0; g < out->groups; ++g, record += stride) quantize_group(weigh(x, factor, weight, g * GROUP), record);

  int32_t most_usual = most_usual_scale(first, stride, out->groups, ROOT_OF_TWO);
  record = first;
  for (size_t g = 0; g < out->groups; ++g, record += stride) {
    if (is_outlier(record, most_usual))
      quantize_group_twice(weigh(x, factor, weight, g * GROUP), distance, record);
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
