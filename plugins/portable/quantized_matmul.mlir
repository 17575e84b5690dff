// y[m, n] = sum over k of x[m, k] * w[n, k], for many rows: the weights are dequantised once, then multiplied.
//
// x is viewed in the shape of the weights' blocks: a [rows, columns] view of the weights in between would cost a copy.
util.func private @$name(%x: $x, $plane_arguments) -> $y {
  %c1 = arith.constant 1 : index
  %zero = arith.constant 0.0 : f32
  %seq = tensor.dim %x, %c1 : $x
  %batch_size = arith.constant $batch : index
  %rows = arith.muli %seq, %batch_size : index
  // A dispatch of its own: fused, it would be done for every tile of rows, and does not compile for SPIR-V targets.
  %weights = flow.dispatch.region -> ($weights) {
    %dequantized = util.call @$dequantize($plane_operands) : ($plane_types) -> $weights
    flow.return %dequantized : $weights
  }
  $cut
  %flat = tensor.collapse_shape $input [[0, 1], [2]] : $x into $flat
  %blocked = tensor.expand_shape %flat [[0], $x_reassociation] output_shape [$rows_extent, $block_extents]
      : $flat into $blocked
  %product_empty = tensor.empty($rows_dim) : $product
  %product_init = linalg.fill ins(%zero : f32) outs(%product_empty : $product) -> $product
  %product = linalg.generic {
      indexing_maps = [affine_map<(m, $n, $k) -> (m, $k)>, affine_map<(m, $n, $k) -> ($n, $k)>,
                       affine_map<(m, $n, $k) -> (m, $n)>],
      iterator_types = ["parallel", $parallels, $reductions]}
      ins(%blocked, %weights : $blocked, $weights) outs(%product_init : $product) {
  ^bb0(%activation: f32, %weight: f32, %sum: f32):
    %term = arith.mulf %activation, %weight : f32
    %next = arith.addf %sum, %term : f32
    linalg.yield %next : f32
  } -> $product
  $join
  %y = tensor.expand_shape $columns [[0, 1], [2]] output_shape [$batch, $seq_extent, $out_features]
      : $columns_type into $y
  util.return %y : $y
}
