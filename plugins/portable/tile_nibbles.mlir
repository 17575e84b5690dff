// Puts 4-bit codes into tiles of 16 rows, without unpacking them: of each step of 8 columns, the first 4 become low
// nibbles and the other 4 high ones.
//
// A row of bytes is read as [group, a, half, c]: with columns in pairs, byte (a, half, c) holds columns 8 a + 4 half +
// 2 c, below, and the next one, above; with columns in halves of a group, 8 a + 4 half + c and that plus 16. So the two
// bytes that differ in `half` hold two codes each of the same two steps. Dimensions: tile, group, a, row in the tile l,
// c, nibble of the source h.
util.func private @$name(%packed: $packed) -> $tiled {
  %rows = flow.tensor.reshape %packed : $packed -> $matrix
  $pad
  %steps = tensor.expand_shape $whole [[0, 1], [2, 3, 4, 5]] output_shape [$tiles, 16, $groups, $a, 2, $c]
      : $padded into tensor<${tiles}x16x${groups}x${a}x2x${c}xi8>
  %first = tensor.extract_slice %steps[0, 0, 0, 0, 0, 0] [$tiles, 16, $groups, $a, 1, $c] [1, 1, 1, 1, 1, 1]
      : tensor<${tiles}x16x${groups}x${a}x2x${c}xi8> to $half
  %second = tensor.extract_slice %steps[0, 0, 0, 0, 1, 0] [$tiles, 16, $groups, $a, 1, $c] [1, 1, 1, 1, 1, 1]
      : tensor<${tiles}x16x${groups}x${a}x2x${c}xi8> to $half
  %init = tensor.empty() : $joined
  %bytes = linalg.generic {
      indexing_maps = [affine_map<($order) -> (t, l, g, a, c)>, affine_map<($order) -> (t, l, g, a, c)>,
                       affine_map<($order) -> ($order)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%first, %second : $half, $half) outs(%init : $joined) {
  ^bb0(%below: i8, %above: i8, %unused: i8):
    %four = arith.constant 4 : i8
    %mask = arith.constant 15 : i8
    %h = linalg.index $h : index
    %h_i8 = arith.index_cast %h : index to i8
    %shift = arith.muli %h_i8, %four : i8
    %below_shifted = arith.shrui %below, %shift : i8
    %above_shifted = arith.shrui %above, %shift : i8
    %low = arith.andi %below_shifted, %mask : i8
    %high = arith.shli %above_shifted, %four : i8
    %byte = arith.ori %low, %high : i8
    linalg.yield %byte : i8
  } -> $joined
  %tiled = tensor.collapse_shape %bytes $collapse : $joined into $tiled
  util.return %tiled : $tiled
}
