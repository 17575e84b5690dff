// Q4_K in tiles: w = factor[group] * nibble - minimum[group].
//
// Dimensions: tile, lane (the row in the tile), block b of 256, group g of 32, byte row i, nibble h (0 low, 1 high), j;
// the column in its group is 8 i + 4 h + j.
util.func private @$name(%d: $d, %dmin: $dmin, %scales: $scales, %qs_flat: $qs) -> $weights {
  %factors, %minima = util.call @${scales_name}(%d, %dmin, %scales)
      : ($d, $dmin, $scales) -> ($group_scales, $group_scales)
  %qs = tensor.expand_shape %qs_flat [[0], [1, 2], [3], [4], [5]] output_shape [$tiles, $blocks, 8, 4, 16, 4]
      : $qs into tensor<${tiles}x${blocks}x8x4x16x4xi8>
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(t, l, b, g, i, h, j) -> (t, b, g, l)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, b, g, l)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, b, g, i, l, j)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, l, b, g, i, h, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%factors, %minima, %qs : $group_scales, $group_scales, tensor<${tiles}x${blocks}x8x4x16x4xi8>)
      outs(%init : $weights) {
  ^bb0(%factor: f32, %minimum: f32, %byte: i8, %unused: f32):
    %four = arith.constant 4 : i8
    %mask = arith.constant 15 : i8
    %h = linalg.index 5 : index
    %h_i8 = arith.index_cast %h : index to i8
    %shift = arith.muli %h_i8, %four : i8
    %shifted = arith.shrui %byte, %shift : i8
    %nibble = arith.andi %shifted, %mask : i8
    %quant = arith.uitofp %nibble : i8 to f32
    %scaled = arith.mulf %quant, %factor : f32
    %weight = arith.subf %scaled, %minimum : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
