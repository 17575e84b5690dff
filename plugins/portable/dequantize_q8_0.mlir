// Q8_0: w = d * byte. Dimensions: row, block, byte.
util.func private @$name(%d: $d, %qs: $qs) -> $weights {
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(n, g, j) -> (n, g)>, affine_map<(n, g, j) -> (n, g, j)>,
                       affine_map<(n, g, j) -> (n, g, j)>],
      iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%d, %qs : $d, $qs) outs(%init : $weights) {
  ^bb0(%scale_f16: f16, %byte: i8, %unused: f32):
    %quant = arith.sitofp %byte : i8 to f32
    %scale = arith.extf %scale_f16 : f16 to f32
    %weight = arith.mulf %quant, %scale : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
