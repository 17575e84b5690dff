// Q8_0 in tiles: w = d * byte. Dimensions: tile, lane (the row in the tile), group, byte row i, j; the column is
// 32 g + 4 i + j.
util.func private @$name(%d: $d, %qs: $qs) -> $weights {
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(t, l, g, i, j) -> (t, g, l)>, affine_map<(t, l, g, i, j) -> (t, g, i, l, j)>,
                       affine_map<(t, l, g, i, j) -> (t, l, g, i, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%d, %qs : $d, $qs) outs(%init : $weights) {
  ^bb0(%scale_f16: f16, %byte: i8, %unused: f32):
    %quant = arith.sitofp %byte : i8 to f32
    %scale = arith.extf %scale_f16 : f16 to f32
    %weight = arith.mulf %quant, %scale : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
