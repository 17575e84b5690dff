// Rotates the keys of new tokens and stores them with their values, in place: the cache goes in and is the result.
util.func private @$name(
    %cache: $cache, %key: $key, %value: $value, %page_table: $table, %positions: $positions, %cosines: $angles,
    %sines: $angles, %layer: index
) -> $cache {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %pages = tensor.dim %cache, %c0 : $cache
  %seq = tensor.dim %key, %c1 : $key
  %entries = tensor.dim %page_table, %c1 : $table
  %seq_i32 = arith.index_castui %seq : index to i32
  %entries_i32 = arith.index_castui %entries : index to i32
  %layer_i32 = arith.index_castui %layer : index to i32
  %batch_i32 = arith.constant $batch : i32
  %kv_heads = arith.constant $kv_heads : i32
  %head_dim = arith.constant $head_dim : i32
  %page_size = arith.constant $page_size : i32
  %layers = arith.constant $layers : i32
  %key_stride = arith.constant $key_stride : i32
  %key_first = arith.constant $key_first : i32
  %value_stride = arith.constant $value_stride : i32
  %value_first = arith.constant $value_first : i32

  %batch = arith.constant $batch : index
  %tokens = arith.muli %seq, %batch : index
  %tokens_per_workgroup = arith.constant $tokens_per_workgroup : i32
  %tokens_per_workgroup_index = arith.constant $tokens_per_workgroup : index
  %workgroups = arith.ceildivui %tokens, %tokens_per_workgroup_index : index
  %updated = flow.dispatch $append[%workgroups, %c1, %c1](
      %batch_i32, %seq_i32, %kv_heads, %head_dim, %page_size, %entries_i32, %layers, %layer_i32, %key_stride,
      %key_first, %value_stride, %value_first, %tokens_per_workgroup,
      %cache, %key, %value, %page_table, %positions, %cosines, %sines)
      : (i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32,
         $cache$page_sizes, $key$seq_sizes, $value$seq_sizes, $table$entry_sizes, $positions$seq_sizes,
         $angles$seq_sizes, $angles$seq_sizes)
      -> %cache$page_sizes
  util.return %updated : $cache
}
