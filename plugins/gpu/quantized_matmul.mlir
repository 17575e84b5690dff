// y = x * w^T by one dispatch, of multiply_few or of multiply_many.
util.func private @${symbol}(%x: ${x}, ${plane_arguments}) -> ${y} {
  %c1 = arith.constant 1 : index
%% if is_few
  %tiles = arith.constant ${tiles} : index
  %blocks = arith.constant ${(rows + rows_each - 1) // rows_each} : index
  %y = flow.dispatch @${name}::@${name}[%tiles, %blocks, %c1](%x, ${plane_operands}) : (${x}, ${plane_types}) -> ${y}
%% else
  %seq = tensor.dim %x, %c1 : ${x}
  %batch = arith.constant ${batch} : index
  %rows = arith.muli %seq, %batch : index
  %rows_i32 = arith.index_castui %rows : index to i32
  %columns = arith.constant ${(tiles + 7) // 8} : index
  %rows_each = arith.constant 32 : index
  %blocks = arith.ceildivui %rows, %rows_each : index
  %y = flow.dispatch @${name}::@${name}[%columns, %blocks, %c1](%rows_i32, %x, ${plane_operands})
      : (i32, ${sized(x, "%seq")}, ${plane_types}) -> ${sized(y, "%seq")}
%% endif
  util.return %y : ${y}
}
