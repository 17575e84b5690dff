// y = x * w^T with the kernels in C: quantises x once, then multiplies bytes. Siblings that share x share the first
// dispatch, which the compiler sees to be the same.
util.func private @$name(%x: $x, $plane_arguments) -> $y {
  %c1 = arith.constant 1 : index
  %seq = tensor.dim %x, %c1 : $x
  %batch = arith.constant $batch : index
  %rows = arith.muli %seq, %batch : index
  %rows_i32 = arith.index_castui %rows : index to i32
  %columns = arith.constant $columns : i32
  %depth = arith.constant $depth : i32

  // Stage 1: activation groups of 40 bytes, $groups a row.
  %row_bytes = arith.constant $row_bytes : index
  %bytes = arith.muli %rows, %row_bytes : index
  %rows_per_workgroup_index = arith.constant $rows_per_workgroup : index
  %rows_per_workgroup = arith.constant $rows_per_workgroup : i32
  %row_workgroups = arith.ceildivui %rows, %rows_per_workgroup_index : index
  %activations = flow.dispatch $quantize[%row_workgroups, %c1, %c1](%rows_i32, %depth, %rows_per_workgroup, %x)
      : (i32, i32, i32, $x$seq_dim) -> tensor<?xi8>{%bytes}

  // Stage 2: all rows for a run of tiles in each workgroup.
  %tile_workgroups = arith.constant $tile_workgroups : index
  %tiles_per_workgroup = arith.constant $tiles_per_workgroup : i32
  %y = flow.dispatch $multiply[%tile_workgroups, %c1, %c1](
      %rows_i32, %columns, %depth, %tiles_per_workgroup, $plane_operands, %activations)
      : (i32, i32, i32, i32, $plane_types, tensor<?xi8>{%bytes}) -> $y$seq_dim
  util.return %y : $y
}
