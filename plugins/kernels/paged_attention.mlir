// Causal attention with the kernel in C, which reads pages where they lie.
//
// The cache is only read, and yet handed on as a tied result: a plain reader beside the next append would be a second
// consumer of this version of the cache, and the compiler would copy the whole of it to keep them apart.
util.func private @$name(
    %query: $query, %cache: $cache, %page_table: $table, %positions: $positions, %layer: index
) -> ($query, $cache) {
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
      %seq_i32, %heads, %kv_heads_i32, %head_dim, %page_size, %entries_i32, %layers, %layer_i32, %window, %scale,
      %softcap, %query, %cache, %page_table, %positions)
      : (i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32,
         $query$seq_sizes, $cache$page_sizes, $table$entry_sizes, $positions$seq_sizes)
      -> ($query$seq_sizes, %cache$page_sizes)
  util.return %output, %unchanged : $query, $cache
}
