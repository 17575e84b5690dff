// Q5_K: w = factor[group] * 5-bit quant - minimum[group].
//
// Groups and low nibbles as in Q4_K; the fifth bit of group g is bit g of the 32 bytes of qh.
// Dimensions: row, block, p, u (which of the pair), j.
util.func private @$name(%d: $d, %dmin: $dmin, %scales: $scales, %qh: $qh, %qs_flat: $qs) -> $weights {
  %factors, %minima = util.call @${scales_name}(%d, %dmin, %scales)
      : ($d, $dmin, $scales) -> ($group_scales, $group_scales)
  %qs = tensor.expand_shape %qs_flat [[0], [1], [2, 3]] output_shape [$rows, $blocks, 4, 32]
      : $qs into tensor<${rows}x${blocks}x4x32xi8>
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(n, b, p, u, j) -> (n, b, p, u)>, affine_map<(n, b, p, u, j) -> (n, b, p, u)>,
                       affine_map<(n, b, p, u, j) -> (n, b, j)>, affine_map<(n, b, p, u, j) -> (n, b, p, j)>,
                       affine_map<(n, b, p, u, j) -> (n, b, p, u, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%factors, %minima, %qh, %qs : $group_scales, $group_scales, $qh, tensor<${rows}x${blocks}x4x32xi8>)
      outs(%init : $weights) {
  ^bb0(%factor: f32, %minimum: f32, %high_byte: i8, %low_byte: i8, %unused: f32):
    %one = arith.constant 1 : i8
    %two = arith.constant 2 : i8
    %four = arith.constant 4 : i8
    %mask = arith.constant 15 : i8
    %p = linalg.index 2 : index
    %u = linalg.index 3 : index
    %p_i8 = arith.index_cast %p : index to i8
    %u_i8 = arith.index_cast %u : index to i8
    %pair_start = arith.muli %p_i8, %two : i8
    %group = arith.addi %pair_start, %u_i8 : i8
    %low_shift = arith.muli %u_i8, %four : i8
    %low_shifted = arith.shrui %low_byte, %low_shift : i8
    %low = arith.andi %low_shifted, %mask : i8
    %high_shifted = arith.shrui %high_byte, %group : i8
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
