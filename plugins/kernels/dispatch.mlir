// One dispatch over all rows of its first operand, which are counted here: everything else is known.
util.func private @$name($arguments) -> ($result_types) {
  %c1 = arith.constant 1 : index
  %seq = tensor.dim %operand0, %c1 : $x
  %batch = arith.constant $batch : index
  %row_count = arith.muli %seq, %batch : index
  %rows = arith.index_castui %row_count : index to i32
  %share = arith.constant $share : index
  %workgroups = $workgroups
  $sizes
  $results = flow.dispatch $entry[%workgroups, %c1, %c1]($operands)
      : ($operand_types) -> ($sized_result_types)
  util.return $results : $result_types
}
