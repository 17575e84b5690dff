// Attention of new tokens, by the kernels of decode_attention or of prefill_attention.
//
// The cache is only read, and yet handed on as a tied result: a plain reader beside the next append would be a second
// consumer of this version of the cache, and the compiler would copy the whole of it to keep them apart.
util.func private @${symbol}(
    %query: ${query}, %cache: ${cache}, %page_table: ${table}, %positions: ${positions}, %layer: index
) -> (${query}, ${cache}) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %pages = tensor.dim %cache, %c0 : ${cache}
  %seq = tensor.dim %query, %c1 : ${query}
  %entries = tensor.dim %page_table, %c1 : ${table}
  %pages_i32 = arith.index_castui %pages : index to i32
  %seq_i32 = arith.index_castui %seq : index to i32
  %entries_i32 = arith.index_castui %entries : index to i32
  %layer_i32 = arith.index_castui %layer : index to i32
  %batch = arith.constant ${batch} : index
%% set reads = "i32, i32, i32, i32, %s, %s, %s, %s" % (sized(query, "%seq"), sized(cache, "%pages"), sized(table, "%entries"), sized(positions, "%seq"))
%% if is_decode
  %blocks = arith.constant ${heads // heads_each} : index
%%   if splits
  // A split for every ${positions_per_split} positions that the table has room for.
  %page_size = arith.constant ${page_size} : index
  %room = arith.muli %entries, %page_size : index
  %positions_per_split = arith.constant ${positions_per_split} : index
  %wanted = arith.ceildivui %room, %positions_per_split : index
  %most = arith.constant ${splits} : index
  %splits = arith.minui %wanted, %most : index
  %splits_i32 = arith.index_castui %splits : index to i32
%%     set partials = "tensor<%dx%dx?x%dxf32>" % (batch, heads, head_dim + 4)
  %partials, %unchanged = flow.dispatch @${name}::@${name}[%blocks, %batch, %splits](
      %pages_i32, %entries_i32, %layer_i32, %splits_i32, %query, %cache, %page_table, %positions)
      : (${reads}) -> (${partials}{%splits}, %cache${sizes(cache, "%pages")})
  %merge_workgroups = arith.constant ${(batch * heads * head_dim // 4 + subgroup * 4 - 1) // (subgroup * 4)} : index
  %output = flow.dispatch @${merge}::@${merge}[%merge_workgroups, %c1, %c1](%splits_i32, %partials)
      : (i32, ${partials}{%splits}) -> ${query}
%%   else
  %one = arith.constant 1 : i32
  %output, %unchanged = flow.dispatch @${name}::@${name}[%blocks, %batch, %c1](
      %pages_i32, %entries_i32, %layer_i32, %one, %query, %cache, %page_table, %positions)
      : (${reads}) -> (${query}, %cache${sizes(cache, "%pages")})
%%   endif
%% else
  // A workgroup takes ${rows_each} of the rows that the tokens and the query heads of a key head make.
  %group = arith.constant ${heads // kv_heads} : index
  %rows = arith.muli %seq, %group : index
  %rows_each = arith.constant ${rows_each} : index
  %blocks = arith.ceildivui %rows, %rows_each : index
  %kv_heads = arith.constant ${kv_heads} : index
  %output, %unchanged = flow.dispatch @${name}::@${name}[%blocks, %kv_heads, %batch](
      %pages_i32, %seq_i32, %entries_i32, %layer_i32, %query, %cache, %page_table, %positions)
      : (${reads}) -> (${sized(query, "%seq")}, %cache${sizes(cache, "%pages")})
%% endif
  util.return %output, %unchanged : ${query}, ${cache}
}
