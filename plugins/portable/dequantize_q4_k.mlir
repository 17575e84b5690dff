// Q4_K: w = factor[group] * nibble - minimum[group].
//
// A block of 256 is eight groups of 32, in four pairs p that share 32 bytes: group 2 * p in their low nibbles, group
// 2 * p + 1 in their high ones. Dimensions: row, block, p, u (which of the pair), j.
util.func private @$name(%d: $d, %dmin: $dmin, %scales: $scales, %qs_flat: $qs) -> $weights {
  %factors, %minima = util.call @${scales_name}(%d, %dmin, %scales)
      : ($d, $dmin, $scales) -> ($group_scales, $group_scales)
  %qs = tensor.expand_shape %qs_flat [[0], [1], [2, 3]] output_shape [$rows, $blocks, 4, 32]
      : $qs into tensor<${rows}x${blocks}x4x32xi8>
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(n, b, p, u, j) -> (n, b, p, u)>, affine_map<(n, b, p, u, j) -> (n, b, p, u)>,
                       affine_map<(n, b, p, u, j) -> (n, b, p, j)>, affine_map<(n, b, p, u, j) -> (n, b, p, u, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%factors, %minima, %qs : $group_scales, $group_scales, tensor<${rows}x${blocks}x4x32xi8>)
      outs(%init : $weights) {
  ^bb0(%factor: f32, %minimum: f32, %byte: i8, %unused: f32):
    %four = arith.constant 4 : i8
    %mask = arith.constant 15 : i8
    %u = linalg.index 3 : index
    %u_i8 = arith.index_cast %u : index to i8
    %shift = arith.muli %u_i8, %four : i8
    %shifted = arith.shrui %byte, %shift : i8
    %nibble = arith.andi %shifted, %mask : i8
    %quant = arith.uitofp %nibble : i8 to f32
    %scaled = arith.mulf %quant, %factor : f32
    %weight = arith.subf %scaled, %minimum : f32
    linalg.yield %weight : f32
  } -> $weights
  util.return %weights : $weights
}
