"""Tuning specs for iree-compile that ask for tiles that no one would choose."""

from string import Template

# The pass that takes a spec up.
TUNING_PASS = "iree-codegen-materialize-tuning-specs"

_SPEC = Template("""
module @spec attributes { transform.with_named_sequence, iree_codegen.tuning_spec_with_default_entrypoint } {
  transform.named_sequence @apply_op_config(%op: !transform.any_op {transform.readonly},
                                            %config: !transform.any_param {transform.readonly}) {
    transform.annotate %op "compilation_info" = %config : !transform.any_op, !transform.any_param
    transform.yield
  }
  transform.named_sequence @match(%op: !transform.any_op {transform.readonly})
      -> (!transform.any_op, !transform.any_param) {
    transform.match.operation_name %op ["$op"] : !transform.any_op
    %right = transform.get_operand %op[1] : (!transform.any_op) -> !transform.any_value
    transform.iree.match.cast_compatible_type %right = $right : !transform.any_value
    %config = transform.param.constant #iree_codegen.compilation_info<
      lowering_config = #iree_cpu.lowering_config<distribution = $distribution, vector_common_parallel = [1, 2, 0],
                                                  vector_reduction = [0, 0, 1]>,
      translation_info = #iree_codegen.translation_info<pipeline = #iree_cpu.pipeline<DoubleTilingExpert>>>
      -> !transform.any_param
    transform.yield %op, %config : !transform.any_op, !transform.any_param
  }
  transform.named_sequence @__kernel_config(%variant: !transform.any_op {transform.consumed})
      -> !transform.any_op attributes { iree_codegen.tuning_spec_entrypoint } {
    %result = transform.foreach_match in %variant @match -> @apply_op_config : (!transform.any_op) -> !transform.any_op
    transform.yield %result : !transform.any_op
  }
}
""")


def bad_tiles(op: str, right: str, distribution: str) -> str:
    """A spec that gives a matmul vectors of one row and two columns.

    Args:
        op: such as "linalg.matmul", as the matmul is when tiles are chosen.
        right: type of its second operand, such as "tensor<64x64xf32>".
        distribution: tile of a workgroup, such as "[2, 4, 0]".
    """
    return _SPEC.substitute(op=op, right=right, distribution=distribution)
