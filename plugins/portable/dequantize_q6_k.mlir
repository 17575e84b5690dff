// Q6_K in tiles: w = d * scales[column / 16] * (6-bit quant - 32).
//
// Dimensions: tile, lane (the row in the tile), block b of 256, group g of 32, c (which sixteen), a, h, j; the column in
// its group is 16 c + 8 a + 4 h + j. The low 4 bits are nibble h of byte row 2 c + a, the high 2 bits are bits
// 2 (2 a + h) of byte row c.
util.func private @$name(%ql_flat: $ql, %qh_flat: $qh, %scales_flat: $scales, %d: $d) -> $weights {
  %ql = tensor.expand_shape %ql_flat [[0], [1, 2], [3, 4], [5], [6]] output_shape [$tiles, $blocks, 8, 2, 2, 16, 4]
      : $ql into tensor<${tiles}x${blocks}x8x2x2x16x4xi8>
  %qh = tensor.expand_shape %qh_flat [[0], [1, 2], [3], [4], [5]] output_shape [$tiles, $blocks, 8, 2, 16, 4]
      : $qh into tensor<${tiles}x${blocks}x8x2x16x4xi8>
  %scales = tensor.expand_shape %scales_flat [[0], [1, 2, 3], [4]] output_shape [$tiles, $blocks, 8, 2, 16]
      : $scales into tensor<${tiles}x${blocks}x8x2x16xi8>
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(t, l, b, g, c, a, h, j) -> (t, b, g, c, a, l, j)>,
                       affine_map<(t, l, b, g, c, a, h, j) -> (t, b, g, c, l, j)>,
                       affine_map<(t, l, b, g, c, a, h, j) -> (t, b, g, c, l)>,
                       affine_map<(t, l, b, g, c, a, h, j) -> (t, b, l)>,
                       affine_map<(t, l, b, g, c, a, h, j) -> (t, l, b, g, c, a, h, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "parallel", "parallel",
                        "parallel"]}
      ins(%ql, %qh, %scales, %d
          : tensor<${tiles}x${blocks}x8x2x2x16x4xi8>, tensor<${tiles}x${blocks}x8x2x16x4xi8>,
            tensor<${tiles}x${blocks}x8x2x16xi8>, $d)
      outs(%init : $weights) {
  ^bb0(%low_byte: i8, %high_byte: i8, %sub_scale: i8, %scale_f16: f16, %unused: f32):
    %two = arith.constant 2 : i8
    %four = arith.constant 4 : i8
    %low_mask = arith.constant 15 : i8
    %high_mask = arith.constant 3 : i8
    %offset = arith.constant 32 : i8
    %a = linalg.index 5 : index
    %h = linalg.index 6 : index
    %a_i8 = arith.index_cast %a : index to i8
    %h_i8 = arith.index_cast %h : index to i8
    %low_shift = arith.muli %h_i8, %four : i8
    %a_shift = arith.muli %a_i8, %four : i8
    %h_shift = arith.muli %h_i8, %two : i8
    %high_shift = arith.addi %a_shift, %h_shift : i8
    %low_shifted = arith.shrui %low_byte, %low_shift : i8
    %low = arith.andi %low_shifted, %low_mask : i8
    %high_shifted = arith.shrui %high_byte, %high_shift : i8
    %high = arith.andi %high_shifted, %high_mask : i8
    %high_placed = arith.shli %high, %four : i8
    %unsigned = arith.ori %low, %high_placed : i8
    %signed = arith.subi %unsigned, %offset : i8
    %quant = arith.sitofp %signed : i8 to f32
    %sub_scale_f32 = arith.sitofp %sub_scale : i8 to f32
    %scale = arith.extf %scale_f16 : f16 to f32
    %block_scale = arith.mulf %scale, %sub_scale_f32 : f32
    %weight = arith.mulf %quant, %block_scale : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
