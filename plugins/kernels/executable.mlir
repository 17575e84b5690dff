// One dispatch that calls $kernel once for each workgroup. The three numbers of its workload are the numbers of
// workgroups.
hal.executable private @${kernel}_executable {
  hal.executable.variant public @$variant target($target)
      objects([#hal.executable.object<{path = "$object"}>]) {
    hal.executable.export public @${kernel}_dispatch ordinal(0) layout($layout)
        count(%device: !hal.device, %x: index, %y: index, %z: index) -> (index, index, index) {
      hal.return %x, %y, %z : index, index, index
    }
    builtin.module {
      func.func private @$kernel($types) attributes {hal.import.static, llvm.bareptr = true}
      func.func @${kernel}_dispatch() {
        %zero = arith.constant 0 : index
        // The kernel knows how far it may go; the compiler need not.
        %unknown_extent = arith.constant 1000000000 : index
        $operands
        func.call @$kernel($arguments) : ($types) -> ()
        return
      }
    }
  }
}
