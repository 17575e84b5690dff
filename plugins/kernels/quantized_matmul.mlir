// y = x * w^T with the kernels in C: quantises x once, then multiplies bytes. Siblings that share x share the first
// dispatch, which the compiler sees to be the same.
util.func private @$name(%x: $x, $plane_arguments) -> $y {
  %codes = util.call @$quantize(%x) : ($x) -> $codes
  %y = util.call @$multiply(%codes, $plane_operands) : ($codes, $plane_types) -> $y
  util.return %y : $y
}
