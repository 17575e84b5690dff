// Joins what splits of a row made of its attention: sums, maxima and totals of each, brought to a common maximum.
#include "quantize.h"

enum { MOST_COLUMNS = 512 };  // of a workgroup

typedef struct {
  const float* partials;  // [rows, heads, splits, head_dim + 2]
  size_t heads, splits, head_dim;
} partial_attention;

// Columns `first` up to `end` of one head of a row.
INLINE void merge_head(const partial_attention* p, size_t row, size_t head, size_t first, size_t end, float* out) {
  size_t stride = p->head_dim + 2;
  const float* partials = p->partials + (row * p->heads + head) * p->splits * stride;
  f32x16 highest = splat(partials[p->head_dim]), total = splat(0.0f);
  for (size_t split = 1; split < p->splits; ++split)
    highest = max_f32(highest, splat(partials[split * stride + p->head_dim]));
  for (size_t d = first; d < end; ++d) out[d - first] = 0.0f;
  for (size_t split = 0; split < p->splits; ++split, partials += stride) {
    if (partials[p->head_dim + 1] == 0.0f) continue;  // it saw nothing
    f32x16 weight = exp_f32(splat(partials[p->head_dim]) - highest);
    total += weight * partials[p->head_dim + 1];
    for (size_t d = first; d < end; ++d) out[d - first] += weight[0] * partials[d];
  }
  if (total[0] == 0.0f) return;  // an idle row: zeros
  for (size_t d = first; d < end; ++d) out[d - first] /= total[0];
}

// A run of columns of one row, and where it ends.
INLINE size_t merge_columns(const partial_attention* p, size_t row, size_t first, size_t count, float* out) {
  size_t end = min_size(p->heads * p->head_dim, first + count);
  for (size_t column = first, next; column < end; column = next) {
    size_t head = column / p->head_dim, head_first = head * p->head_dim;
    next = min_size(end, head_first + p->head_dim);
    merge_head(p, row, head, column - head_first, next - head_first, out + (column - first));
  }
  return end;
}

// One workgroup merges a run of columns of one row.
//   partials               see llmir_rope_append_attend
//   output                 float32 [rows, heads * head_dim]
//   columns_per_workgroup  at most 512
KERNEL void llmir_merge_attention(const float* restrict partials, size_t partials_offset, float* restrict output,
                                  size_t output_offset, size_t heads, size_t head_dim, size_t splits, size_t workgroup,
                                  size_t row, size_t columns_per_workgroup) {
  const partial_attention p = {partials + partials_offset, heads, splits, head_dim};
  float merged[MOST_COLUMNS];
  size_t first = workgroup * columns_per_workgroup;
  size_t end = merge_columns(&p, row, first, columns_per_workgroup, merged);
  float* out = output + output_offset + row * heads * head_dim + first;
  for (size_t i = 0; i < end - first; ++i) out[i] = merged[i];
}

// The same, quantised.
//   output                 quantised activations [rows, heads * head_dim], see activations.h
//   columns_per_workgroup  at most 512, a multiple of 32
KERNEL void llmir_merge_attention_quantize(const float* restrict partials, size_t partials_offset,
                                           uint8_t* restrict output, size_t output_offset, size_t rows, size_t heads,
                                           size_t head_dim, size_t splits, size_t workgroup, size_t row,
                                           size_t columns_per_workgroup) {
  const partial_attention p = {partials + partials_offset, heads, splits, head_dim};
  float merged[MOST_COLUMNS];
  size_t first = workgroup * columns_per_workgroup, groups = heads * head_dim / GROUP, stride;
  size_t end = merge_columns(&p, row, first, columns_per_workgroup, merged);
  activation_group* record = (activation_group*)(output + output_offset) + activation_index(rows, groups, row, &stride);
  record += first / GROUP * stride;
  size_t count = (end - first) / GROUP;
  for (size_t g = 0; g < count; ++g) quantize_group(load_values(merged + g * GROUP), record + g * stride);
  int32_t most_usual = most_usual_scale(record, stride, count, ROOT_OF_TWO);
  for (size_t g = 0; g < count; ++g) {
    if (is_outlier(record + g * stride, most_usual))
      quantize_group_twice(load_values(merged + g * GROUP), rest_distance(rows, groups), record + g * stride);
  }
}
