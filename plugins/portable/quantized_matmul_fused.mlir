// y[m, n] = sum over k of x[m, k] * w[n, k], in one dispatch that dequantises as it multiplies.
//
// The weights are read once and never stored as floats, so that the memory a step needs does not grow with the model.
util.func private @$name(%x: $x, $plane_arguments) -> $y {
  %c1 = arith.constant 1 : index
  %batch_size = arith.constant $batch : index
  %seq = tensor.dim %x, %c1 : $x
  %rows = arith.muli %seq, %batch_size : index
  %flat = tensor.collapse_shape %x [[0, 1], [2]] : $x into $flat
  %blocked = tensor.expand_shape %flat [[0], $x_reassociation] output_shape [$rows_extent, $block_extents]
      : $flat into $blocked
  %product = flow.dispatch.region -> ($product$rows_sizes) {
    %zero = arith.constant 0.0 : f32
    %weights = util.call @$dequantize($plane_operands) : ($plane_types) -> $weights
    %product_empty = tensor.empty($rows_dim) : $product
    %product_init = linalg.fill ins(%zero : f32) outs(%product_empty : $product) -> $product
    %sums = linalg.generic {
        indexing_maps = [affine_map<(m, $n, $k) -> (m, $k)>, affine_map<(m, $n, $k) -> ($n, $k)>,
                         affine_map<(m, $n, $k) -> (m, $n)>],
        iterator_types = ["parallel", $parallels, $reductions]}
        ins(%blocked, %weights : $blocked, $weights) outs(%product_init : $product) {
    ^bb0(%activation: f32, %weight: f32, %sum: f32):
      %term = arith.mulf %activation, %weight : f32
      %next = arith.addf %sum, %term : f32
      linalg.yield %next : f32
    } -> $product
    flow.return %sums : $product
  }
  $join
  %y = tensor.expand_shape $columns [[0, 1], [2]] output_shape [$batch, $seq_extent, $out_features]
      : $columns_type into $y
  util.return %y : $y
}
