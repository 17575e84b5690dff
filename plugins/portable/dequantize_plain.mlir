// Floating-point weights: one element a block.
util.func private @$name(%w: $w) -> $weights {
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(n, k) -> (n, k)>, affine_map<(n, k) -> (n, k)>],
      iterator_types = ["parallel", "parallel"]}
      ins(%w : $w) outs(%init : $weights) {
  ^bb0(%stored: $dtype, %unused: f32):
    %weight = arith.extf %stored : $dtype to f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
