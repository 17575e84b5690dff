// y = x * w^T for a row or a few, as one reduction of which iree-compile is told how lanes share it; left to itself it
// has every lane of a subgroup do the same, or reads the weights again for every row.
//
// Dimensions: row m of x, tile t, row l of the tile, group g, step i of 8 columns. The 8 columns of a step stand side by
// side in the body, one operand of x for each: so a lane holds 4 rows of a tile, as it reads them in 16 bytes, and
// nothing but sums of them. Lanes with the same 4 rows are added up at the end.
%% set steps = "tensor<%dx%dx4x8xf32>" % (rows, groups)
%% set column = "tensor<%dx%dx4xf32>" % (rows, groups)
%% set product_type = "tensor<%dx%dx16xf32>" % (rows, tiles)
%% set shapes = dict(planes)
%% set all = "(m, t, l, g, i)"
%% set operands = []
%% for k in range(8)
%%   set _ = operands.append(("%%x_%d" % k, column, "m, g, i", "%%activation_%d" % k, "f32"))
%% endfor
%% if format in ("f16", "bf16")
%%   set stored = "tensor<%dx%dx4x8x16x%s>" % (tiles, groups, format)
%%   set taken = "tensor<%dx%dx4x16x%s>" % (tiles, groups, format)
%%   for k in range(8)
%%     set _ = operands.append(("%%w_%d" % k, taken, "t, g, i, l", "%%weight_%d" % k, format))
%%   endfor
%% else
%%   set halves = 2 if format == "q8_0" else 1
%%   set words_type = "tensor<%dx%dx%dx16xi32>" % (tiles, groups, 4 * halves)
%%   set halves_type = "tensor<%dx%dx4x2x16xi32>" % (tiles, groups)
%%   set half_type = "tensor<%dx%dx4x16xi32>" % (tiles, groups)
%%   for half in range(halves)
%%     set _ = operands.append(("%words" if halves == 1 else "%%half_%d" % half, half_type, "t, g, i, l", "%%word_%d" % half, "i32"))
%%   endfor
%%   for plane in ("d", "m")
%%     if plane in shapes
%%       set _ = operands.append(("%" ~ plane, shapes[plane], "t, g, l", "%" ~ plane ~ "_f16", "f16"))
%%     endif
%%   endfor
%% endif
util.func private @${symbol}(%x: ${x}, ${plane_arguments}) -> ${y} {
  // Stage 1: x by steps, and the codes as words of 4 bytes, of which nothing is moved.
  %flat = tensor.collapse_shape %x [[0, 1], [2]] : ${x} into tensor<${rows}x${groups * 32}xf32>
  %stepped = tensor.expand_shape %flat [[0], [1, 2, 3]] output_shape [${rows}, ${groups}, 4, 8]
      : tensor<${rows}x${groups * 32}xf32> into ${steps}
%% if format in ("f16", "bf16")
  %stored = tensor.expand_shape %w [[0], [1, 2, 3], [4]] output_shape [${tiles}, ${groups}, 4, 8, 16]
      : ${shapes.w} into ${stored}
%% else
  %words = flow.tensor.bitcast %qs : ${shapes.qs} -> ${words_type}
%%   if halves == 2
  %word_pairs = tensor.expand_shape %words [[0], [1], [2, 3], [4]] output_shape [${tiles}, ${groups}, 4, 2, 16]
      : ${words_type} into ${halves_type}
%%   endif
%% endif

  %product = flow.dispatch.region -> (${product_type}) {
    // Stage 2: the columns of a step.
%% for k in range(8)
    %x_${k} = tensor.extract_slice %stepped[0, 0, 0, ${k}] [${rows}, ${groups}, 4, 1] [1, 1, 1, 1] : ${steps} to ${column}
%%   if format in ("f16", "bf16")
    %w_${k} = tensor.extract_slice %stored[0, 0, 0, ${k}, 0] [${tiles}, ${groups}, 4, 1, 16] [1, 1, 1, 1, 1]
        : ${stored} to ${taken}
%%   endif
%% endfor
%% if format == "q8_0"
%%   for half in range(2)
    %half_${half} = tensor.extract_slice %word_pairs[0, 0, 0, ${half}, 0] [${tiles}, ${groups}, 4, 1, 16] [1, 1, 1, 1, 1]
        : ${halves_type} to ${half_type}
%%   endfor
%% endif

    // Stage 3: the product, in float32.
    %zero = arith.constant 0.0 : f32
    %product_empty = tensor.empty() : ${product_type}
    %product_init = linalg.fill ins(%zero : f32) outs(%product_empty : ${product_type}) -> ${product_type}
    %sums = linalg.generic {
        indexing_maps = [
%%- for _, _, map, _, _ in operands
affine_map<${all} -> (${map})>, ${" "}
%%- endfor
affine_map<${all} -> (m, t, l)>],
        iterator_types = ["parallel", "parallel", "parallel", "reduction", "reduction"]}
        ins(${operands | map(attribute=0) | join(", ")} : ${operands | map(attribute=1) | join(", ")})
        outs(%product_init : ${product_type})
%% if subgroups
        attrs = {compilation_info = #iree_codegen.compilation_info<lowering_config = #iree_gpu.lowering_config<{
            lane_basis = [[1, 1, 4, ${subgroup // 16}, 4], [0, 1, 2, 3, 4]],
            subgroup_basis = [[1, 1, 1, ${subgroups}, 1], [0, 1, 2, 3, 4]], thread = [0, 0, 4, 1, 1],
            partial_reduction = [0, 0, 0, ${subgroups * subgroup // 16}, 4], workgroup = [${rows}, 1, 16, 0, 0]}>,
            translation_info = #iree_codegen.translation_info<pipeline = #iree_gpu.pipeline<VectorDistribute>
                workgroup_size = [${subgroups * subgroup}, 1, 1] subgroup_size = ${subgroup}, {}>>}
%% endif
        {
    ^bb0(
%%- for _, _, _, name, element in operands
${name}: ${element}, ${" "}
%%- endfor
%sum: f32):
%% if format in ("f16", "bf16")
%%   for k in range(8)
      %code_${k} = arith.extf %weight_${k} : ${format} to f32
%%   endfor
%% elif format == "q8_0"
      %high_byte = arith.constant 24 : i32
%%   for k in range(8)
      %up_${k} = arith.constant ${24 - 8 * (k % 4)} : i32
      %raised_${k} = arith.shli %word_${k // 4}, %up_${k} : i32
      %signed_${k} = arith.shrsi %raised_${k}, %high_byte : i32
      %code_${k} = arith.sitofp %signed_${k} : i32 to f32
%%   endfor
%% else
      %nibble = arith.constant 15 : i32
%%   for k in range(8)
      %down_${k} = arith.constant ${8 * (k % 4) + 4 * (k // 4)} : i32
      %lowered_${k} = arith.shrui %word_0, %down_${k} : i32
      %low_${k} = arith.andi %lowered_${k}, %nibble : i32
      %code_${k} = arith.uitofp %low_${k} : i32 to f32
%%   endfor
%% endif
      %dot_0 = arith.mulf %code_0, %activation_0 : f32
%% for k in range(1, 8)
      %dot_${k} = math.fma %code_${k}, %activation_${k}, %dot_${k - 1} : f32
%% endfor
%% if format in ("q4_0", "q4_1")
%%   for k in range(1, 8)
      %all_${k} = arith.addf ${"%%all_%d" % (k - 1) if k > 1 else "%activation_0"}, %activation_${k} : f32
%%   endfor
%% endif
%% if format in ("f16", "bf16")
%%   set term = "%dot_7"
%% else
%%   set term = "%term"
      %factor = arith.extf %d_f16 : f16 to f32
%%   if format == "q4_0"
      %offset = arith.constant -8.0 : f32
      %signed_dot = math.fma %all_7, %offset, %dot_7 : f32
      %term = arith.mulf %factor, %signed_dot : f32
%%   elif format == "q4_1"
      %minimum = arith.extf %m_f16 : f16 to f32
      %minima = arith.mulf %minimum, %all_7 : f32
      %term = math.fma %factor, %dot_7, %minima : f32
%%   else
      %term = arith.mulf %factor, %dot_7 : f32
%%   endif
%% endif
      %next = arith.addf %sum, ${term} : f32
      linalg.yield %next : f32
    } -> ${product_type}
    flow.return %sums : ${product_type}
  }

  // Stage 4: rows of zeros that fill the last tile are no columns of y.
  %padded = tensor.collapse_shape %product [[0], [1, 2]] : ${product_type} into tensor<${rows}x${tiles * 16}xf32>
%% if tiles * 16 == out_features
%%   set columns = "%padded"
%% else
%%   set columns = "%columns"
  %columns = tensor.extract_slice %padded[0, 0] [${rows}, ${out_features}] [1, 1]
      : tensor<${rows}x${tiles * 16}xf32> to tensor<${rows}x${out_features}xf32>
%% endif
  %y = tensor.expand_shape ${columns} [[0, 1], [2]] output_shape [${batch}, ${rows // batch}, ${out_features}]
      : tensor<${rows}x${out_features}xf32> into ${y}
  util.return %y : ${y}
}
