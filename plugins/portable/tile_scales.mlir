// Puts the scales of a matrix into tiles of 16 rows, each as often as there are groups of 32 columns that share it.
// Dimensions: tile, scale of the row s, repetition n, row in the tile l.
util.func private @$name(%scales: $scales) -> $tiled {
  %rows = flow.tensor.reshape %scales : $scales -> $matrix
  $pad
  %lanes = tensor.expand_shape $whole [[0, 1], [2]] output_shape [$tiles, 16, $count]
      : $padded into tensor<${tiles}x16x${count}xf16>
  %init = tensor.empty() : tensor<${tiles}x${count}x${repeats}x16xf16>
  %repeated = linalg.generic {
      indexing_maps = [affine_map<(t, s, n, l) -> (t, l, s)>, affine_map<(t, s, n, l) -> (t, s, n, l)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%lanes : tensor<${tiles}x16x${count}xf16>) outs(%init : tensor<${tiles}x${count}x${repeats}x16xf16>) {
  ^bb0(%scale: f16, %unused: f16):
    linalg.yield %scale : f16
  } -> tensor<${tiles}x${count}x${repeats}x16xf16>
  %tiled = tensor.collapse_shape %repeated [[0], [1, 2], [3]] : tensor<${tiles}x${count}x${repeats}x16xf16> into $tiled
  util.return %tiled : $tiled
}
