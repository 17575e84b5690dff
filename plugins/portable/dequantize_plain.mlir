// Floating-point weights in tiles. Dimensions: tile, lane (the row in the tile), column.
util.func private @$name(%w: $w) -> $weights {
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(t, l, k) -> (t, k, l)>, affine_map<(t, l, k) -> (t, l, k)>],
      iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%w : $w) outs(%init : $weights) {
  ^bb0(%stored: $dtype, %unused: f32):
    %weight = arith.extf %stored : $dtype to f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
