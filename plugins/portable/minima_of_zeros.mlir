// Minima of groups with a zero point: scale * (code - zero) = scale * code + minimum. Dimensions: row r, scale of the
// row s.
util.func private @$name(%scales_shaped: $scales, %zeros_shaped: $zeros) -> $matrix {
  %scales = flow.tensor.reshape %scales_shaped : $scales -> $matrix
  %zeros = flow.tensor.reshape %zeros_shaped : $zeros -> $zero_matrix
  %init = tensor.empty() : $matrix
  %minima = linalg.generic {
      indexing_maps = [affine_map<(r, s) -> (r, s)>, affine_map<(r, s) -> (r, s)>, affine_map<(r, s) -> (r, s)>],
      iterator_types = ["parallel", "parallel"]}
      ins(%scales, %zeros : $matrix, $zero_matrix) outs(%init : $matrix) {
  ^bb0(%scale: f16, %zero: $zero, %unused: f16):
    %scale_f32 = arith.extf %scale : f16 to f32
    %zero_f32 = $convert %zero : $zero to f32
    %product = arith.mulf %scale_f32, %zero_f32 : f32
    %minimum = arith.negf %product : f32
    %minimum_f16 = arith.truncf %minimum : f32 to f16
    linalg.yield %minimum_f16 : f16
  } -> $matrix
  util.return %minima : $matrix
}
