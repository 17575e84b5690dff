// Q5_K in tiles: w = factor[group] * 5-bit quant - minimum[group].
//
// Dimensions and low nibbles as in Q4_K; the fifth bit is bit 2 i + h of the byte of qh.
util.func private @$name(%d: $d, %dmin: $dmin, %scales: $scales, %qh_flat: $qh, %qs_flat: $qs) -> $weights {
  %factors, %minima = util.call @${scales_name}(%d, %dmin, %scales)
      : ($d, $dmin, $scales) -> ($group_scales, $group_scales)
  %qh_blocks = tensor.expand_shape %qh_flat [[0], [1, 2], [3], [4], [5]] output_shape [$tiles, $blocks, 8, 1, 16, 4]
      : $qh into tensor<${tiles}x${blocks}x8x1x16x4xi8>
  %qh = tensor.collapse_shape %qh_blocks [[0], [1], [2, 3], [4], [5]]
      : tensor<${tiles}x${blocks}x8x1x16x4xi8> into tensor<${tiles}x${blocks}x8x16x4xi8>
  %qs = tensor.expand_shape %qs_flat [[0], [1, 2], [3], [4], [5]] output_shape [$tiles, $blocks, 8, 4, 16, 4]
      : $qs into tensor<${tiles}x${blocks}x8x4x16x4xi8>
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(t, l, b, g, i, h, j) -> (t, b, g, l)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, b, g, l)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, b, g, l, j)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, b, g, i, l, j)>,
                       affine_map<(t, l, b, g, i, h, j) -> (t, l, b, g, i, h, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%factors, %minima, %qh, %qs
          : $group_scales, $group_scales, tensor<${tiles}x${blocks}x8x16x4xi8>,
            tensor<${tiles}x${blocks}x8x4x16x4xi8>)
      outs(%init : $weights) {
  ^bb0(%factor: f32, %minimum: f32, %high_byte: i8, %low_byte: i8, %unused: f32):
    %one = arith.constant 1 : i8
    %two = arith.constant 2 : i8
    %four = arith.constant 4 : i8
    %mask = arith.constant 15 : i8
    %i = linalg.index 4 : index
    %h = linalg.index 5 : index
    %i_i8 = arith.index_cast %i : index to i8
    %h_i8 = arith.index_cast %h : index to i8
    %pair_start = arith.muli %i_i8, %two : i8
    %step = arith.addi %pair_start, %h_i8 : i8
    %low_shift = arith.muli %h_i8, %four : i8
    %low_shifted = arith.shrui %low_byte, %low_shift : i8
    %low = arith.andi %low_shifted, %mask : i8
    %high_shifted = arith.shrui %high_byte, %step : i8
    %high = arith.andi %high_shifted, %one : i8
    %high_placed = arith.shli %high, %four : i8
    %quant_i8 = arith.ori %low, %high_placed : i8
    %quant = arith.uitofp %quant_i8 : i8 to f32
    %scaled = arith.mulf %quant, %factor : f32
    %weight = arith.subf %scaled, %minimum : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
