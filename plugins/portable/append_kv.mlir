// Writes the keys and values of new tokens into their pages, in place.
//
// Each (row, token, head) is one slice of head_dim elements; its place in the cache is five indices:
// page, layer, kind (0 key, 1 value), head, slot in the page. Padding (a negative position) is masked out.
util.func private @$name(
    %cache: $cache, %key: $new, %value: $new, %page_table: $table, %positions: $positions, %layer_constant: index
) -> $cache {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c2 = arith.constant 2 : index
  %zero = arith.constant 0 : i32
  %key_kind = arith.constant 0 : i32
  %value_kind = arith.constant 1 : i32
  %page_size = arith.constant $page_size : i32
  %seq = tensor.dim %key, %c1 : $new

  // All layers share the dispatches below only as long as the layer is not a constant to the compiler.
  %layer = util.optimization_barrier %layer_constant : index
  %layer_i32 = arith.index_cast %layer : index to i32

  // Stage 1: which slices to store.
  %mask_init = tensor.empty($seq_dim) : tensor<${batch}x${seq}x${kv_heads}xi1>
  %mask = linalg.generic {
      indexing_maps = [affine_map<(b, s, h) -> (b, s)>, affine_map<(b, s, h) -> (b, s, h)>],
      iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%positions : $positions) outs(%mask_init : tensor<${batch}x${seq}x${kv_heads}xi1>) {
  ^bb0(%position: i32, %init: i1):
    %stored = arith.cmpi sge, %position, %zero : i32
    linalg.yield %stored : i1
  } -> tensor<${batch}x${seq}x${kv_heads}xi1>

  // Stage 2: where. The two index tensors differ in the kind only. They are a dispatch of their own: fused into the
  // scatters, they do not compile for SPIR-V targets when the sequence is dynamic.
  %index_init = tensor.empty($seq_dim) : tensor<${batch}x${seq}x${kv_heads}x5xi32>
  %indices:2 = flow.dispatch.region
      -> (tensor<${batch}x${seq}x${kv_heads}x5xi32>$seq_sizes, tensor<${batch}x${seq}x${kv_heads}x5xi32>$seq_sizes) {
    %key_index, %value_index = linalg.generic {
        indexing_maps = [affine_map<(b, s, h, i) -> (b, s)>,
                         affine_map<(b, s, h, i) -> (b, s, h, i)>, affine_map<(b, s, h, i) -> (b, s, h, i)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
        ins(%positions : $positions)
        outs(%index_init, %index_init
             : tensor<${batch}x${seq}x${kv_heads}x5xi32>, tensor<${batch}x${seq}x${kv_heads}x5xi32>) {
    ^bb0(%signed_position: i32, %init0: i32, %init1: i32):
      %b = linalg.index 0 : index
      %h = linalg.index 2 : index
      %i = linalg.index 3 : index
      %position = arith.maxsi %signed_position, %zero : i32
      %table_entry = arith.divui %position, %page_size : i32
      %slot = arith.remui %position, %page_size : i32
      %table_index = arith.index_cast %table_entry : i32 to index
      %page = tensor.extract %page_table[%b, %table_index] : $table
      %head = arith.index_cast %h : index to i32
      %is_page = arith.cmpi eq, %i, %c0 : index
      %is_layer = arith.cmpi eq, %i, %c1 : index
      %is_kind = arith.cmpi eq, %i, %c2 : index
      %c3 = arith.constant 3 : index
      %is_head = arith.cmpi eq, %i, %c3 : index
      %head_or_slot = arith.select %is_head, %head, %slot : i32
      %key_tail = arith.select %is_kind, %key_kind, %head_or_slot : i32
      %value_tail = arith.select %is_kind, %value_kind, %head_or_slot : i32
      %page_or_layer = arith.select %is_page, %page, %layer_i32 : i32
      %in_front = arith.ori %is_page, %is_layer : i1
      %key_component = arith.select %in_front, %page_or_layer, %key_tail : i32
      %value_component = arith.select %in_front, %page_or_layer, %value_tail : i32
      linalg.yield %key_component, %value_component : i32, i32
    } -> (tensor<${batch}x${seq}x${kv_heads}x5xi32>, tensor<${batch}x${seq}x${kv_heads}x5xi32>)
    flow.return %key_index, %value_index
        : tensor<${batch}x${seq}x${kv_heads}x5xi32>, tensor<${batch}x${seq}x${kv_heads}x5xi32>
  }

  // Stage 3: the values in the cache's dtype, a dispatch of their own for the same reason.
  %values:2 = flow.dispatch.region -> ($stored$seq_sizes, $stored$seq_sizes) {
    %stored_init = tensor.empty($seq_dim) : $stored
    %stored_key, %stored_value = linalg.generic {
        indexing_maps = [affine_map<(b, s, h, d) -> (b, s, h, d)>, affine_map<(b, s, h, d) -> (b, s, h, d)>,
                         affine_map<(b, s, h, d) -> (b, s, h, d)>, affine_map<(b, s, h, d) -> (b, s, h, d)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
        ins(%key, %value : $new, $new) outs(%stored_init, %stored_init : $stored, $stored) {
    ^bb0(%k: $new_dtype, %v: $new_dtype, %init0: $cache_dtype, %init1: $cache_dtype):
      %k_stored = $store %k : $new_dtype to $cache_dtype
      %v_stored = $store %v : $new_dtype to $cache_dtype
      linalg.yield %k_stored, %v_stored : $cache_dtype, $cache_dtype
    } -> ($stored, $stored)
    flow.return %stored_key, %stored_value : $stored, $stored
  }

  // Stage 4: the stores. Each takes the only version of the cache there is, so that it may write in place.
  %with_keys = iree_linalg_ext.scatter dimension_map = [0, 1, 2, 3, 4] unique_indices(true)
      ins(%values#0, %indices#0, %mask
          : $stored, tensor<${batch}x${seq}x${kv_heads}x5xi32>, tensor<${batch}x${seq}x${kv_heads}xi1>)
      outs(%cache : $cache) {
  ^bb0(%update: $cache_dtype, %original: $cache_dtype):
    iree_linalg_ext.yield %update : $cache_dtype
  } -> $cache
  %with_both = iree_linalg_ext.scatter dimension_map = [0, 1, 2, 3, 4] unique_indices(true)
      ins(%values#1, %indices#1, %mask
          : $stored, tensor<${batch}x${seq}x${kv_heads}x5xi32>, tensor<${batch}x${seq}x${kv_heads}xi1>)
      outs(%with_keys : $cache) {
  ^bb0(%update: $cache_dtype, %original: $cache_dtype):
    iree_linalg_ext.yield %update : $cache_dtype
  } -> $cache
  util.return %with_both : $cache
}
