// Q6_K: w = d * scales[k / 16] * (6-bit quant - 32).
//
// A block of 256 is two halves h of 128; a half is four runs of 32, numbered 2 * u + v. Run (u, v) takes its low 4 bits
// from nibble u of ql[64 * h + 32 * v ..] and its high 2 bits from qh[32 * h ..], bits 2 * (2 * u + v). A run is two
// sixteens i with a scale each. Dimensions: row, block, h, u, v, i, j.
util.func private @$name(%ql_flat: $ql, %qh_flat: $qh, %scales_flat: $scales, %d: $d) -> $weights {
  %ql = tensor.expand_shape %ql_flat [[0], [1], [2, 3, 4, 5]] output_shape [$rows, $blocks, 2, 2, 2, 16]
      : $ql into tensor<${rows}x${blocks}x2x2x2x16xi8>
  %qh = tensor.expand_shape %qh_flat [[0], [1], [2, 3, 4]] output_shape [$rows, $blocks, 2, 2, 16]
      : $qh into tensor<${rows}x${blocks}x2x2x16xi8>
  %scales = tensor.expand_shape %scales_flat [[0], [1], [2, 3, 4, 5]] output_shape [$rows, $blocks, 2, 2, 2, 2]
      : $scales into tensor<${rows}x${blocks}x2x2x2x2xi8>
  %init = tensor.empty() : $weights
  %weights = linalg.generic {
      indexing_maps = [affine_map<(n, b, h, u, v, i, j) -> (n, b, h, v, i, j)>,
                       affine_map<(n, b, h, u, v, i, j) -> (n, b, h, i, j)>,
                       affine_map<(n, b, h, u, v, i, j) -> (n, b, h, u, v, i)>,
                       affine_map<(n, b, h, u, v, i, j) -> (n, b)>,
                       affine_map<(n, b, h, u, v, i, j) -> (n, b, h, u, v, i, j)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%ql, %qh, %scales, %d
          : tensor<${rows}x${blocks}x2x2x2x16xi8>, tensor<${rows}x${blocks}x2x2x16xi8>,
            tensor<${rows}x${blocks}x2x2x2x2xi8>, $d)
      outs(%init : $weights) {
  ^bb0(%low_byte: i8, %high_byte: i8, %sub_scale: i8, %scale_f16: f16, %unused: f32):
    %two = arith.constant 2 : i8
    %four = arith.constant 4 : i8
    %low_mask = arith.constant 15 : i8
    %high_mask = arith.constant 3 : i8
    %offset = arith.constant 32 : i8
    %u = linalg.index 3 : index
    %v = linalg.index 4 : index
    %u_i8 = arith.index_cast %u : index to i8
    %v_i8 = arith.index_cast %v : index to i8
    %low_shift = arith.muli %u_i8, %four : i8
    %v_shift = arith.muli %v_i8, %two : i8
    %high_shift = arith.addi %low_shift, %v_shift : i8
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
