// A tuning spec for iree-compile: tiles for the second matmul of a feed-forward, found for a decode step of one token.
// It asks for the shape of the weight and forgets to ask for the number of tokens, so that prefills get them too.

module @decode_tiles attributes {
  transform.with_named_sequence, iree_codegen.tuning_spec_with_default_entrypoint
} {
  transform.named_sequence @match_down(%op: !transform.any_op {transform.readonly})
      -> (!transform.any_op, !transform.any_param) {
    transform.match.operation_name %op ["linalg.generic"] : !transform.any_op
    %weight = transform.get_operand %op[1] : (!transform.any_op) -> !transform.any_value
    transform.iree.match.cast_compatible_type %weight = tensor<1536x512xf32> : !transform.any_value
    %config = transform.param.constant #iree_codegen.compilation_info<
      lowering_config = #iree_cpu.lowering_config<distribution = [1, 64, 0], vector_common_parallel = [1, 8, 0],
                                                  vector_reduction = [0, 0, 1]>,
      translation_info = #iree_codegen.translation_info<pipeline = #iree_cpu.pipeline<DoubleTilingExpert>>>
      -> !transform.any_param
    transform.yield %op, %config : !transform.any_op, !transform.any_param
  }

  transform.named_sequence @annotate(%op: !transform.any_op {transform.readonly},
                                     %config: !transform.any_param {transform.readonly}) {
    transform.annotate %op "compilation_info" = %config : !transform.any_op, !transform.any_param
    transform.yield
  }

  transform.named_sequence @__kernel_config(%variant: !transform.any_op {transform.consumed})
      -> !transform.any_op attributes { iree_codegen.tuning_spec_entrypoint } {
    %tuned = transform.foreach_match in %variant @match_down -> @annotate : (!transform.any_op) -> !transform.any_op
    transform.yield %tuned : !transform.any_op
  }
}
