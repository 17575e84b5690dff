// y = x * w^T with the kernel in C, for weights in halves: all rows for a run of tiles in each workgroup.
util.func private @$name(%x: $x, $plane_arguments) -> $y {
  %c1 = arith.constant 1 : index
  %seq = tensor.dim %x, %c1 : $x
  %batch = arith.constant $batch : index
  %rows = arith.muli %seq, %batch : index
  %rows_i32 = arith.index_castui %rows : index to i32
  %columns = arith.constant $columns : i32
  %depth = arith.constant $depth : i32
  %tile_workgroups = arith.constant $tile_workgroups : index
  %tiles_per_workgroup = arith.constant $tiles_per_workgroup : i32
  %y = flow.dispatch $multiply[%tile_workgroups, %c1, %c1](
      %rows_i32, %columns, %depth, %tiles_per_workgroup, $plane_operands, %x)
      : (i32, i32, i32, i32, $plane_types, $x$seq_dim) -> $y$seq_dim
  util.return %y : $y
}
