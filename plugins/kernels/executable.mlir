// One dispatch that calls $kernel once for each workgroup. The three numbers of its workload are the numbers of
// workgroups.
//
// The dispatch is written as what IREE lowers dispatches to, iree/hal/local/executable_library.h, because only there is
// the processor described that it runs on: objects for several are linked, and the features decide which one is called.
hal.executable private @${kernel}_executable {
  hal.executable.variant public @$variant target($target) objects([$objects]) {
    hal.executable.export public @${kernel}_dispatch ordinal(0) layout($layout)
        count(%device: !hal.device, %x: index, %y: index, %z: index) -> (index, index, index) {
      hal.return %x, %y, %z : index, index, index
    }
    builtin.module {
      $declarations
      llvm.func @${kernel}_dispatch(%environment: !llvm.ptr, %state: !llvm.ptr, %workgroup: !llvm.ptr) -> i32 {
        %zero = llvm.mlir.constant(0 : i64) : i64
        %constants_at = llvm.getelementptr %state[0, 9] : (!llvm.ptr) -> !llvm.ptr,
            !llvm.struct<(i32, i32, i16, i16, i32, i32, i16, i8, i8, ptr, ptr, ptr)>
        %constants = llvm.load %constants_at : !llvm.ptr -> !llvm.ptr
        %bindings_at = llvm.getelementptr %state[0, 10] : (!llvm.ptr) -> !llvm.ptr,
            !llvm.struct<(i32, i32, i16, i16, i32, i32, i16, i8, i8, ptr, ptr, ptr)>
        %bindings = llvm.load %bindings_at : !llvm.ptr -> !llvm.ptr
        %features_at = llvm.getelementptr %environment[0, 4, 0] : (!llvm.ptr) -> !llvm.ptr,
            !llvm.struct<(ptr, ptr, ptr, ptr, array<8 x i64>)>
        %features = llvm.load %features_at : !llvm.ptr -> i64
        $operands
        $calls
      ^done:
        %success = llvm.mlir.constant(0 : i32) : i32
        llvm.return %success : i32
      }
    }
  }
}
