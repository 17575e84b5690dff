// The eight 6-bit scales and minima of a Q4_K or Q5_K block in tiles, times the block's two float factors.
//
// Of the 12 bytes, the first four hold scales 0..3 in their low 6 bits, the next four the minima 0..3; the last four
// hold the low nibbles of scales and minima 4..7, whose high 2 bits are the top bits of the first eight bytes.
// Dimensions: tile, block, group g of 32, lane (the row in the tile).
util.func private @$name(%d: $d, %dmin: $dmin, %scales: $scales) -> ($group_scales, $group_scales) {
  %init = tensor.empty() : $group_scales
  %factors, %minima = linalg.generic {
      indexing_maps = [affine_map<(t, b, g, l) -> (t, b, l)>, affine_map<(t, b, g, l) -> (t, b, l)>,
                       affine_map<(t, b, g, l) -> (t, b, g, l)>, affine_map<(t, b, g, l) -> (t, b, g, l)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%d, %dmin : $d, $dmin) outs(%init, %init : $group_scales, $group_scales) {
  ^bb0(%d_f16: f16, %dmin_f16: f16, %unused0: f32, %unused1: f32):
    %c4 = arith.constant 4 : index
    %c8 = arith.constant 8 : index
    %four = arith.constant 4 : i8
    %six = arith.constant 6 : i8
    %low4 = arith.constant 15 : i8
    %low6 = arith.constant 63 : i8
    %t = linalg.index 0 : index
    %b = linalg.index 1 : index
    %g = linalg.index 2 : index
    %l = linalg.index 3 : index
    %k = arith.remui %g, %c4 : index
    %k_second = arith.addi %k, %c4 : index
    %k_third = arith.addi %k, %c8 : index
    %first = tensor.extract %scales[%t, %b, %k, %l] : $scales
    %second = tensor.extract %scales[%t, %b, %k_second, %l] : $scales
    %third = tensor.extract %scales[%t, %b, %k_third, %l] : $scales
    %early = arith.cmpi ult, %g, %c4 : index
    %early_scale = arith.andi %first, %low6 : i8
    %early_minimum = arith.andi %second, %low6 : i8
    %scale_low = arith.andi %third, %low4 : i8
    %minimum_low = arith.shrui %third, %four : i8
    %scale_top = arith.shrui %first, %six : i8
    %minimum_top = arith.shrui %second, %six : i8
    %scale_high = arith.shli %scale_top, %four : i8
    %minimum_high = arith.shli %minimum_top, %four : i8
    %late_scale = arith.ori %scale_low, %scale_high : i8
    %late_minimum = arith.ori %minimum_low, %minimum_high : i8
    %scale_i8 = arith.select %early, %early_scale, %late_scale : i8
    %minimum_i8 = arith.select %early, %early_minimum, %late_minimum : i8
    %scale_quant = arith.uitofp %scale_i8 : i8 to f32
    %minimum_quant = arith.uitofp %minimum_i8 : i8 to f32
    %d_f32 = arith.extf %d_f16 : f16 to f32
    %dmin_f32 = arith.extf %dmin_f16 : f16 to f32
    %factor = arith.mulf %scale_quant, %d_f32 : f32
    %minimum = arith.mulf %minimum_quant, %dmin_f32 : f32
    linalg.yield %factor, %minimum : f32, f32
  } -> ($group_scales, $group_scales)
  util.return %factors, %minima : $group_scales, $group_scales
}
