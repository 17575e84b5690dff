// Index of the first largest element of every row, by two reductions: the largest, then the least index that holds it.
// A row in which nothing equals the largest (all NaN) gives its last index. The reductions are of 32 bits: CUDA code
// generation does not distribute one of 64.
util.func private @$name(%x: $x) -> $indices {
  %lowest = arith.constant 0xFF800000 : f32
  %last = arith.constant $last : i32
  %largest_empty = tensor.empty() : $largest
  %largest_init = linalg.fill ins(%lowest : f32) outs(%largest_empty : $largest) -> $largest
  %largest = linalg.generic {
      indexing_maps = [affine_map<(b, v) -> (b, v)>, affine_map<(b, v) -> (b)>],
      iterator_types = ["parallel", "reduction"]}
      ins(%x : $x) outs(%largest_init : $largest) {
  ^bb0(%element: f32, %so_far: f32):
    %larger = arith.maximumf %element, %so_far : f32
    linalg.yield %larger : f32
  } -> $largest
  %least_empty = tensor.empty() : $least
  %least_init = linalg.fill ins(%last : i32) outs(%least_empty : $least) -> $least
  %least = linalg.generic {
      indexing_maps = [affine_map<(b, v) -> (b, v)>, affine_map<(b, v) -> (b)>, affine_map<(b, v) -> (b)>],
      iterator_types = ["parallel", "reduction"]}
      ins(%x, %largest : $x, $largest) outs(%least_init : $least) {
  ^bb0(%element: f32, %maximum: f32, %so_far: i32):
    %v = linalg.index 1 : index
    %index = arith.index_cast %v : index to i32
    %is_largest = arith.cmpf oeq, %element, %maximum : f32
    %candidate = arith.select %is_largest, %index, %last : i32
    %lesser = arith.minsi %candidate, %so_far : i32
    linalg.yield %lesser : i32
  } -> $least
  %index_empty = tensor.empty() : $indices
  %indices = linalg.generic {
      indexing_maps = [affine_map<(b) -> (b)>, affine_map<(b) -> (b)>], iterator_types = ["parallel"]}
      ins(%least : $least) outs(%index_empty : $indices) {
  ^bb0(%index: i32, %unused: i64):
    %wide = arith.extsi %index : i32 to i64
    linalg.yield %wide : i64
  } -> $indices
  util.return %indices : $indices
}
