// Rotates queries and attends, over pages that hold the new tokens already. The cache is handed on as a tied result,
// for the reason that stands in paged_attention.mlir.
util.func private @$name(
    %query: $query, %cache: $cache, %page_table: $table, %positions: $positions, %cosines: $angles, %sines: $angles,
    %layer: index
) -> ($output, $cache) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %pages = tensor.dim %cache, %c0 : $cache
  %seq = tensor.dim %query, %c1 : $query
  %entries = tensor.dim %page_table, %c1 : $table
  %seq_i32 = arith.index_castui %seq : index to i32
  %entries_i32 = arith.index_castui %entries : index to i32
  %layer_i32 = arith.index_castui %layer : index to i32
  %heads = arith.constant $heads : i32
  %kv_heads_i32 = arith.constant $kv_heads : i32
  %head_dim = arith.constant $head_dim : i32
  %page_size = arith.constant $page_size : i32
  %layers = arith.constant $layers : i32
  %query_stride = arith.constant $query_stride : i32
  %query_first = arith.constant $query_first : i32
  %window = arith.constant $window : i32
  %scale_f32 = arith.constant $scale : f32
  %scale = arith.bitcast %scale_f32 : f32 to i32
  %softcap_f32 = arith.constant $softcap : f32
  %softcap = arith.bitcast %softcap_f32 : f32 to i32

  // A workgroup takes $queries of the queries that share a key head.
  %group = arith.constant $group : index
  %queries = arith.muli %seq, %group : index
  %queries_per_workgroup = arith.constant $queries : index
  %blocks = arith.ceildivui %queries, %queries_per_workgroup : index
  %kv_heads = arith.constant $kv_heads : index
  %batch = arith.constant $batch : index
  %output, %unchanged = flow.dispatch $attend[%blocks, %kv_heads, %batch](
      %seq_i32, %heads, %kv_heads_i32, %head_dim, %page_size, %entries_i32, %layers, %layer_i32, %query_stride,
      %query_first, %window, %scale, %softcap, %query, %cache, %page_table, %positions, %cosines, %sines)
      : (i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32,
         $query$seq_sizes, $cache$page_sizes, $table$entry_sizes, $positions$seq_sizes, $angles$seq_sizes,
         $angles$seq_sizes)
      -> ($output$seq_sizes, %cache$page_sizes)
  util.return %output, %unchanged : $output, $cache
}
