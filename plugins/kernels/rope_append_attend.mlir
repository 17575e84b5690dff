// All of attention for one new token a row: one dispatch that rotates, stores and attends, its workgroups sharing out
// a long row's pages, and one that joins what they found.
util.func private @$name(
    %cache: $cache, %query: $query, %key: $key, %value: $value, %page_table: $table, %positions: $positions,
    %cosines: $angles, %sines: $angles, %layer: index
) -> ($output, $cache) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %pages = tensor.dim %cache, %c0 : $cache
  %entries = tensor.dim %page_table, %c1 : $table
  %entries_i32 = arith.index_castui %entries : index to i32
  %layer_i32 = arith.index_castui %layer : index to i32
  %heads = arith.constant $heads : i32
  %kv_heads_i32 = arith.constant $kv_heads : i32
  %head_dim = arith.constant $head_dim : i32
  %page_size = arith.constant $page_size : i32
  %layers = arith.constant $layers : i32
  %query_stride = arith.constant $query_stride : i32
  %query_first = arith.constant $query_first : i32
  %key_stride = arith.constant $key_stride : i32
  %key_first = arith.constant $key_first : i32
  %value_stride = arith.constant $value_stride : i32
  %value_first = arith.constant $value_first : i32
  %window = arith.constant $window : i32
  %scale_f32 = arith.constant $scale : f32
  %scale = arith.bitcast %scale_f32 : f32 to i32
  %softcap_f32 = arith.constant $softcap : f32
  %softcap = arith.bitcast %softcap_f32 : f32 to i32

  // Stage 1: a split for every $positions_per_split positions that the table has room for, up to $most_splits.
  %page_size_index = arith.constant $page_size : index
  %room = arith.muli %entries, %page_size_index : index
  %positions_per_split = arith.constant $positions_per_split : index
  %wanted = arith.ceildivui %room, %positions_per_split : index
  %most_splits = arith.constant $most_splits : index
  %split_count = arith.minui %wanted, %most_splits : index
  %splits = arith.index_castui %split_count : index to i32
  %kv_heads = arith.constant $kv_heads : index
  %batch = arith.constant $batch : index
  %rows = arith.constant $batch : i32
  %updated, %partials = flow.dispatch $attend[%split_count, %kv_heads, %batch](
      %heads, %kv_heads_i32, %head_dim, %page_size, %entries_i32, %layers, %layer_i32, %query_stride, %query_first,
      %key_stride, %key_first, %value_stride, %value_first, %window, %scale, %softcap, %splits,
      %cache, %query, %key, %value, %page_table, %positions, %cosines, %sines)
      : (i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32,
         $cache$page_sizes, $query, $key, $value, $table$entry_sizes, $positions, $angles, $angles)
      -> (%cache$page_sizes, $partials{%split_count})

  // Stage 2: $columns_per_workgroup columns of a row in each workgroup.
  %column_workgroups = arith.constant $column_workgroups : index
  %columns_per_workgroup = arith.constant $columns_per_workgroup : i32
  %output = flow.dispatch $merge[%column_workgroups, %batch, %c1](
      $merge_sizes, %partials)
      : ($merge_types, $partials{%split_count}) -> $output
  util.return %output, %updated : $output, $cache
}
