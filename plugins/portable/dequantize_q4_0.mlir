// Q4_0 in tiles: w = d * (nibble - 8). Dimensions: tile, lane (the row in the tile), group, byte row i, nibble h (0 low,
// 1 high), j; the column is 32 g + 8 i + 4 h + j.
util.func private @$name(%d: $d, %qs: $qs) -> $weights {
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(t, l, g, i, h, j) -> (t, g, l)>, affine_map<(t, l, g, i, h, j) -> (t, g, i, l, j)>,
                       affine_map<(t, l, g, i, h, j) -> (t, l, g, i, h, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%d, %qs : $d, $qs) outs(%init : $weights) {
  ^bb0(%scale_f16: f16, %byte: i8, %unused: f32):
    %four = arith.constant 4 : i8
    %mask = arith.constant 15 : i8
    %eight = arith.constant 8.0 : f32
    %h = linalg.index 4 : index
    %h_i8 = arith.index_cast %h : index to i8
    %shift = arith.muli %h_i8, %four : i8
    %shifted = arith.shrui %byte, %shift : i8
    %nibble = arith.andi %shifted, %mask : i8
    %quant = arith.uitofp %nibble : i8 to f32
    %centered = arith.subf %quant, %eight : f32
    %scale = arith.extf %scale_f16 : f16 to f32
    %weight = arith.mulf %centered, %scale : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
