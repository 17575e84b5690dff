// The kernels of machine_peaks.c as functions that a program calls.
util.func public @read_memory(%bytes_view: !hal.buffer_view, %workgroups_i32: i32) -> !hal.buffer_view {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %vector_bytes = arith.constant 64 : index
  %workgroups = arith.index_castui %workgroups_i32 : i32 to index
  %nbytes = hal.buffer_view.dim<%bytes_view : !hal.buffer_view>[0] : index
  %bytes = hal.tensor.import %bytes_view : !hal.buffer_view -> tensor<?xi8>{%nbytes}
  %vectors = arith.divui %nbytes, %vector_bytes : index
  %vectors_i32 = arith.index_castui %vectors : index to i32
  %share = arith.ceildivui %vectors, %workgroups : index
  %share_i32 = arith.index_castui %share : index to i32
  %seen = flow.dispatch $read[%workgroups, %c1, %c1](%vectors_i32, %share_i32, %bytes)
      : (i32, i32, tensor<?xi8>{%nbytes}) -> tensor<?xi32>{%workgroups}
  %seen_view = hal.tensor.export %seen : tensor<?xi32>{%workgroups} -> !hal.buffer_view
  util.return %seen_view : !hal.buffer_view
}

util.func public @multiply_bytes(
    %a_view: !hal.buffer_view, %b_view: !hal.buffer_view, %workgroups_i32: i32, %rounds: i32
) -> !hal.buffer_view {
  %c1 = arith.constant 1 : index
  %workgroups = arith.index_castui %workgroups_i32 : i32 to index
  %a = hal.tensor.import %a_view : !hal.buffer_view -> tensor<4x64xi8>
  %b = hal.tensor.import %b_view : !hal.buffer_view -> tensor<4x64xi8>
  %sums = flow.dispatch $multiply_bytes[%workgroups, %c1, %c1](%rounds, %a, %b)
      : (i32, tensor<4x64xi8>, tensor<4x64xi8>) -> tensor<?x16xi32>{%workgroups}
  %sums_view = hal.tensor.export %sums : tensor<?x16xi32>{%workgroups} -> !hal.buffer_view
  util.return %sums_view : !hal.buffer_view
}

util.func public @multiply_floats(
    %a_view: !hal.buffer_view, %b_view: !hal.buffer_view, %workgroups_i32: i32, %rounds: i32
) -> !hal.buffer_view {
  %c1 = arith.constant 1 : index
  %workgroups = arith.index_castui %workgroups_i32 : i32 to index
  %a = hal.tensor.import %a_view : !hal.buffer_view -> tensor<4x16xf32>
  %b = hal.tensor.import %b_view : !hal.buffer_view -> tensor<4x16xf32>
  %sums = flow.dispatch $multiply_floats[%workgroups, %c1, %c1](%rounds, %a, %b)
      : (i32, tensor<4x16xf32>, tensor<4x16xf32>) -> tensor<?x16xf32>{%workgroups}
  %sums_view = hal.tensor.export %sums : tensor<?x16xf32>{%workgroups} -> !hal.buffer_view
  util.return %sums_view : !hal.buffer_view
}
