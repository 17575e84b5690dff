// Causal attention over a paged cache: gathers the pages of one layer, then scores, softmax and weighted sum.
//
// The cache is read by one dispatch that hands it on as a tied result. A plain reader beside the next append would be a
// second consumer of this version of the cache, and the compiler would copy the whole of it to keep them apart.
util.func private @$name(
    %query: $query, %cache: $cache, %page_table: $table, %positions: $positions, %layer_constant: index
) -> ($query, $cache) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c2 = arith.constant 2 : index
  %one = arith.constant 1 : i32
  %zero = arith.constant 0 : i32
  %zero_f32 = arith.constant 0.0 : f32
  %lowest = arith.constant -1.0e+30 : f32
  %scale = arith.constant $scale : f32
  %has_softcap = arith.constant $has_softcap
  %softcap = arith.constant $softcap : f32
  %window = arith.constant $window : i32
  %seq = tensor.dim %query, %c1 : $query
  %pages = tensor.dim %cache, %c0 : $cache
  %table = tensor.dim %page_table, %c1 : $table

  // All layers share the dispatches below only as long as the layer is not a constant to the compiler.
  %layer = util.optimization_barrier %layer_constant : index

  // Stage 1: how many positions of each row are stored: one more than the largest.
  %length_empty = tensor.empty() : tensor<${batch}xi32>
  %length_init = linalg.fill ins(%zero : i32) outs(%length_empty : tensor<${batch}xi32>) -> tensor<${batch}xi32>
  %lengths = linalg.generic {
      indexing_maps = [affine_map<(b, s) -> (b, s)>, affine_map<(b, s) -> (b)>],
      iterator_types = ["parallel", "reduction"]}
      ins(%positions : $positions) outs(%length_init : tensor<${batch}xi32>) {
  ^bb0(%position: i32, %longest: i32):
    %length = arith.addi %position, %one : i32
    %longer = arith.maxsi %length, %longest : i32
    linalg.yield %longer : i32
  } -> tensor<${batch}xi32>

  // Stage 2: keys and values of the layer as float32, in the order of positions. What lies past the end of a row is
  // zero here whatever the page holds, because a weight of zero does not cancel a NaN.
  %gathered:3 = flow.dispatch.workgroups[%table, %pages](%cache, %page_table, %lengths, %layer, %table, %pages)
      : ($cache$page_sizes, $table$table_sizes, tensor<${batch}xi32>, index, index, index)
      -> (%cache$page_sizes, $gathered$table_sizes, $gathered$table_sizes) =
      (%cache_ref: !iree_tensor_ext.dispatch.tensor<readwrite:$cache>,
       %table_ref: !iree_tensor_ext.dispatch.tensor<readonly:$table>,
       %lengths_ref: !iree_tensor_ext.dispatch.tensor<readonly:tensor<${batch}xi32>>,
       %layer_arg: index, %table_arg: index, %pages_arg: index,
       %keys_ref: !iree_tensor_ext.dispatch.tensor<writeonly:$gathered>,
       %values_ref: !iree_tensor_ext.dispatch.tensor<writeonly:$gathered>) {
    %kind_key = arith.constant 0 : index
    %kind_value = arith.constant 1 : index
    %first_page = arith.constant 0 : index
    %page_size = arith.constant $page_size : index
    %absent = arith.constant 0.0 : f32
    %table_size = iree_tensor_ext.dispatch.workload.ordinal %table_arg, 0 : index
    %page_count = iree_tensor_ext.dispatch.workload.ordinal %pages_arg, 1 : index
    %cache_shaped = flow.dispatch.tie_shape %cache_ref
        : !iree_tensor_ext.dispatch.tensor<readwrite:$cache>$page_counts
    %table_shaped = flow.dispatch.tie_shape %table_ref
        : !iree_tensor_ext.dispatch.tensor<readonly:$table>$table_counts
    %keys_shaped = flow.dispatch.tie_shape %keys_ref
        : !iree_tensor_ext.dispatch.tensor<writeonly:$gathered>$table_counts
    %values_shaped = flow.dispatch.tie_shape %values_ref
        : !iree_tensor_ext.dispatch.tensor<writeonly:$gathered>$table_counts
    %stored = iree_tensor_ext.dispatch.tensor.load %cache_shaped, offsets = [0, 0, 0, 0, 0, 0],
        sizes = [$page_extent, $layers, 2, $kv_heads, $page_size, $head_dim], strides = [1, 1, 1, 1, 1, 1]
        : !iree_tensor_ext.dispatch.tensor<readwrite:$cache>$page_counts -> $cache
    %entries = iree_tensor_ext.dispatch.tensor.load %table_shaped, offsets = [0, 0], sizes = [$batch, $table_extent],
        strides = [1, 1] : !iree_tensor_ext.dispatch.tensor<readonly:$table>$table_counts -> $table
    %row_lengths = iree_tensor_ext.dispatch.tensor.load %lengths_ref, offsets = [0], sizes = [$batch], strides = [1]
        : !iree_tensor_ext.dispatch.tensor<readonly:tensor<${batch}xi32>> -> tensor<${batch}xi32>
    %gathered_init = tensor.empty($table_size) : $gathered
    %row_keys, %row_values = linalg.generic {
        indexing_maps = [affine_map<(b, h, p, t, d) -> (b, p)>, affine_map<(b, h, p, t, d) -> (b)>,
                         affine_map<(b, h, p, t, d) -> (b, h, p, t, d)>,
                         affine_map<(b, h, p, t, d) -> (b, h, p, t, d)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
        ins(%entries, %row_lengths : $table, tensor<${batch}xi32>)
        outs(%gathered_init, %gathered_init : $gathered, $gathered) {
    ^bb0(%entry: i32, %length: i32, %init0: f32, %init1: f32):
      %h = linalg.index 1 : index
      %p = linalg.index 2 : index
      %t = linalg.index 3 : index
      %d = linalg.index 4 : index
      %page_start = arith.muli %p, %page_size : index
      %position = arith.addi %page_start, %t : index
      %row_length = arith.index_cast %length : i32 to index
      %present = arith.cmpi slt, %position, %row_length : index
      %named_page = arith.index_cast %entry : i32 to index
      %page = arith.select %present, %named_page, %first_page : index
      %key = tensor.extract %stored[%page, %layer_arg, %kind_key, %h, %t, %d] : $cache
      %value = tensor.extract %stored[%page, %layer_arg, %kind_value, %h, %t, %d] : $cache
      %key_f32 = $load %key : $cache_dtype to f32
      %value_f32 = $load %value : $cache_dtype to f32
      %key_or_zero = arith.select %present, %key_f32, %absent : f32
      %value_or_zero = arith.select %present, %value_f32, %absent : f32
      linalg.yield %key_or_zero, %value_or_zero : f32, f32
    } -> ($gathered, $gathered)
    iree_tensor_ext.dispatch.tensor.store %row_keys, %keys_shaped, offsets = [0, 0, 0, 0, 0],
        sizes = [$batch, $kv_heads, $table_extent, $page_size, $head_dim], strides = [1, 1, 1, 1, 1]
        : $gathered -> !iree_tensor_ext.dispatch.tensor<writeonly:$gathered>$table_counts
    iree_tensor_ext.dispatch.tensor.store %row_values, %values_shaped, offsets = [0, 0, 0, 0, 0],
        sizes = [$batch, $kv_heads, $table_extent, $page_size, $head_dim], strides = [1, 1, 1, 1, 1]
        : $gathered -> !iree_tensor_ext.dispatch.tensor<writeonly:$gathered>$table_counts
    flow.return
  } count(%table_load: index, %pages_load: index) -> (index, index, index) {
    %x, %y, %z = iree_tensor_ext.dispatch.workgroup_count_from_slice(%table_load, %pages_load)
    flow.return %x, %y, %z : index, index, index
  }
  %keys = tensor.collapse_shape %gathered#1 [[0], [1], [2, 3], [4]] : $gathered into $flat
  %values = tensor.collapse_shape %gathered#2 [[0], [1], [2, 3], [4]] : $gathered into $flat
  %positions_stored = tensor.dim %keys, %c2 : $flat

  // Stage 3: scores of every token against every position, one group of query heads to a key head.
  %grouped = tensor.expand_shape %query [[0], [1], [2, 3], [4]]
      output_shape [$batch, $seq_extent, $kv_heads, $group, $head_dim] : $query into $grouped
  %score_empty = tensor.empty($score_dims) : $scores
  %score_init = linalg.fill ins(%zero_f32 : f32) outs(%score_empty : $scores) -> $scores
  %scores = linalg.generic {
      indexing_maps = [affine_map<(b, h, g, s, t, d) -> (b, s, h, g, d)>,
                       affine_map<(b, h, g, s, t, d) -> (b, h, t, d)>,
                       affine_map<(b, h, g, s, t, d) -> (b, h, g, s, t)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "reduction"]}
      ins(%grouped, %keys : $grouped, $flat) outs(%score_init : $scores) {
  ^bb0(%q: f32, %k: f32, %sum: f32):
    %product = arith.mulf %q, %k : f32
    %next = arith.addf %sum, %product : f32
    linalg.yield %next : f32
  } -> $scores

  // Stage 4: scale, cap, and hide what a token must not see.
  %visible = linalg.generic {
      indexing_maps = [affine_map<(b, h, g, s, t) -> (b, h, g, s, t)>, affine_map<(b, h, g, s, t) -> (b, s)>,
                       affine_map<(b, h, g, s, t) -> (b, h, g, s, t)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%scores, %positions : $scores, $positions) outs(%score_empty : $scores) {
  ^bb0(%score: f32, %position: i32, %init: f32):
    %t_index = linalg.index 4 : index
    %t = arith.index_cast %t_index : index to i32
    %scaled = arith.mulf %score, %scale : f32
    %relative = arith.divf %scaled, %softcap : f32
    %bent = math.tanh %relative : f32
    %capped = arith.mulf %bent, %softcap : f32
    %final = arith.select %has_softcap, %capped, %scaled : f32
    %not_later = arith.cmpi sle, %t, %position : i32
    %distance = arith.subi %position, %t : i32
    %in_window = arith.cmpi slt, %distance, %window : i32
    %is_visible = arith.andi %not_later, %in_window : i1
    %shown = arith.select %is_visible, %final, %lowest : f32
    linalg.yield %shown : f32
  } -> $scores

  // Stage 5: softmax, in float32.
  %weights = linalg.softmax dimension(4) ins(%visible : $scores) outs(%score_empty : $scores) -> $scores

  // Stage 6: the weighted sum of the values, back in the order of the query; padding gets zeros.
  %sum_empty = tensor.empty($seq_dim) : $grouped
  %sum_init = linalg.fill ins(%zero_f32 : f32) outs(%sum_empty : $grouped) -> $grouped
  %sums = linalg.generic {
      indexing_maps = [affine_map<(b, s, h, g, d, t) -> (b, h, g, s, t)>,
                       affine_map<(b, s, h, g, d, t) -> (b, h, t, d)>,
                       affine_map<(b, s, h, g, d, t) -> (b, s, h, g, d)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel", "reduction"]}
      ins(%weights, %values : $scores, $flat) outs(%sum_init : $grouped) {
  ^bb0(%weight: f32, %value: f32, %sum: f32):
    %product = arith.mulf %weight, %value : f32
    %next = arith.addf %sum, %product : f32
    linalg.yield %next : f32
  } -> $grouped
  %attended = linalg.generic {
      indexing_maps = [affine_map<(b, s, h, g, d) -> (b, s, h, g, d)>, affine_map<(b, s, h, g, d) -> (b, s)>,
                       affine_map<(b, s, h, g, d) -> (b, s, h, g, d)>],
      iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
      ins(%sums, %positions : $grouped, $positions) outs(%sum_empty : $grouped) {
  ^bb0(%sum: f32, %position: i32, %init: f32):
    %is_token = arith.cmpi sge, %position, %zero : i32
    %result = arith.select %is_token, %sum, %zero_f32 : f32
    linalg.yield %result : f32
  } -> $grouped
  %output = tensor.collapse_shape %attended [[0], [1], [2, 3], [4]] : $grouped into $query
  util.return %output, %gathered#0 : $query, $cache
}
