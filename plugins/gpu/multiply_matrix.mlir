// y = x * w^T for many rows, as one contraction of ${unit} that iree-compile gives to matrix instructions, which add up in
// float32: it makes one dispatch of all that stands in the region, and unpacks weights as it loads them.
//
// Matrix instructions want 16 or more columns in a row. Tiles have 4, so a weight says itself, by its column in the
// group, in which byte it is. Dimensions: row m of x, tile t, row l of the tile, group g, column c of the group.
%% set w_type = "tensor<%dx16x%dx32x%s>" % (tiles, groups, unit)
%% set x_type = "tensor<%dx%dx32x%s>" % (rows, groups, unit)
%% set x_f32_type = "tensor<%dx%dx32xf32>" % (rows, groups)
%% set product_type = "tensor<%dx%dx16xf32>" % (rows, tiles)
%% set x_map = "affine_map<(m, t, l, g, c) -> (m, g, c)>"
%% set w_map = "affine_map<(m, t, l, g, c) -> (t, l, g, c)>"
%% set product_map = "affine_map<(m, t, l, g, c) -> (m, t, l)>"
%% set shapes = dict(planes)
%% macro extracted(name, plane, index)
      %${name} = tensor.extract %${plane}[${index}] : ${shapes[plane]}
%% endmacro
util.func private @${symbol}(%x: ${x}, ${plane_arguments}) -> ${y} {
  // Stage 1: x in ${unit}. What is too large for it becomes the largest number that is not.
  %flat = tensor.collapse_shape %x [[0, 1], [2]] : ${x} into tensor<${rows}x${groups * 32}xf32>
  %grouped = tensor.expand_shape %flat [[0], [1, 2]] output_shape [${rows}, ${groups}, 32]
      : tensor<${rows}x${groups * 32}xf32> into ${x_f32_type}
  %largest = arith.constant ${largest} : f32
  %least = arith.constant -${largest} : f32
  %x_init = tensor.empty() : ${x_type}
  %x_unit = linalg.generic {
      indexing_maps = [affine_map<(m, g, c) -> (m, g, c)>, affine_map<(m, g, c) -> (m, g, c)>],
      iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%grouped : ${x_f32_type}) outs(%x_init : ${x_type}) {
  ^bb0(%number: f32, %unused: ${unit}):
    %bounded_above = arith.minimumf %number, %largest : f32
    %bounded = arith.maximumf %bounded_above, %least : f32
    %rounded = arith.truncf %bounded : f32 to ${unit}
    linalg.yield %rounded : ${unit}
  } -> ${x_type}

  %product = flow.dispatch.region -> (${product_type}) {
    // Stage 2: the weights, which are never stored.
    %matrix_init = tensor.empty() : ${w_type}
    %matrix = linalg.generic {
        indexing_maps = [affine_map<(t, l, g, c) -> (t, l, g, c)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
        outs(%matrix_init : ${w_type}) {
    ^bb0(%unused: ${unit}):
      %c2 = arith.constant 2 : index
      %c4 = arith.constant 4 : index
      %c8 = arith.constant 8 : index
      %c16 = arith.constant 16 : index
      %t = linalg.index 0 : index
      %l = linalg.index 1 : index
      %g = linalg.index 2 : index
      %c = linalg.index 3 : index
%% if format in ("f16", "bf16")
      %c32 = arith.constant 32 : index
      %group_start = arith.muli %g, %c32 : index
      %column = arith.addi %group_start, %c : index
${extracted("weight", "w", "%t, %column, %l")}
%% else
      %word = arith.divui %c, %c4 : index
      %k = arith.remui %c, %c4 : index
%%   if format == "q8_0"
${extracted("byte", "qs", "%t, %g, %word, %l, %k")}
      %code = arith.sitofp %byte : i8 to f32
%%   else
      %step = arith.divui %c, %c8 : index
      %nibble_number = arith.remui %word, %c2 : index
      %nibble_bit_index = arith.muli %nibble_number, %c4 : index
      %nibble_bit = arith.index_castui %nibble_bit_index : index to i8
      %nibble_mask = arith.constant 15 : i8
${extracted("byte", "ql" if format == "q6_k" else "qs", "%t, %g, %step, %l, %k")}
      %lowered = arith.shrui %byte, %nibble_bit : i8
      %low = arith.andi %lowered, %nibble_mask : i8
%%     if format in ("q5_k", "q6_k")
      // Bit word of qh in q5_k, bits 2 * (word mod 4) and the next in q6_k.
      %four = arith.constant 4 : i8
%%       if format == "q5_k"
      %c0 = arith.constant 0 : index
      %high_bit = arith.index_castui %word : index to i8
      %high_mask = arith.constant 1 : i8
${extracted("high_byte", "qh", "%t, %g, %c0, %l, %k")}
%%       else
      %half_group = arith.divui %c, %c16 : index
      %word_in_half = arith.remui %word, %c4 : index
      %high_bit_index = arith.muli %word_in_half, %c2 : index
      %high_bit = arith.index_castui %high_bit_index : index to i8
      %high_mask = arith.constant 3 : i8
${extracted("high_byte", "qh", "%t, %g, %half_group, %l, %k")}
%%       endif
      %high_lowered = arith.shrui %high_byte, %high_bit : i8
      %high = arith.andi %high_lowered, %high_mask : i8
      %high_raised = arith.shli %high, %four : i8
      %whole = arith.ori %low, %high_raised : i8
      %code = arith.uitofp %whole : i8 to f32
%%     else
      %code = arith.uitofp %low : i8 to f32
%%     endif
%%   endif
%%   if format in ("q4_0", "q4_1", "q8_0")
${extracted("d_f16", "d", "%t, %g, %l")}
      %factor = arith.extf %d_f16 : f16 to f32
%%     if format == "q4_0"
      %offset = arith.constant 8.0 : f32
      %signed = arith.subf %code, %offset : f32
      %weight_f32 = arith.mulf %signed, %factor : f32
%%     elif format == "q4_1"
${extracted("m_f16", "m", "%t, %g, %l")}
      %minimum = arith.extf %m_f16 : f16 to f32
      %scaled = arith.mulf %code, %factor : f32
      %weight_f32 = arith.addf %scaled, %minimum : f32
%%     else
      %weight_f32 = arith.mulf %code, %factor : f32
%%     endif
%%   else
      %block = arith.divui %g, %c8 : index
${extracted("d_f16", "d", "%t, %block, %l")}
      %d_f32 = arith.extf %d_f16 : f16 to f32
%%     if format == "q6_k"
      %halves = arith.muli %g, %c2 : index
      %half_number = arith.addi %halves, %half_group : index
${extracted("scale_i8", "scales", "%t, %half_number, %l")}
      %scale_f32 = arith.sitofp %scale_i8 : i8 to f32
      %factor = arith.mulf %d_f32, %scale_f32 : f32
      %offset = arith.constant 32.0 : f32
      %signed = arith.subf %code, %offset : f32
      %weight_f32 = arith.mulf %signed, %factor : f32
%%     else
      // Scales and minima of 6 bits, packed as weights.mlir tells.
      %mask_6 = arith.constant 63 : i8
      %two = arith.constant 2 : i8
      %mask_4 = arith.constant 15 : i8
      %mask_top = arith.constant 48 : i8
      %shift_4 = arith.constant 4 : i8
      %number = arith.remui %g, %c8 : index
      %first_at = arith.remui %number, %c4 : index
      %second_at = arith.addi %first_at, %c4 : index
      %third_at = arith.addi %first_at, %c8 : index
      %is_early = arith.cmpi ult, %number, %c4 : index
${extracted("first", "scales", "%t, %block, %first_at, %l")}
${extracted("second", "scales", "%t, %block, %second_at, %l")}
${extracted("third", "scales", "%t, %block, %third_at, %l")}
      %third_high = arith.shrui %third, %shift_4 : i8
%%       for kind, run, third in (("scale", "first", "third"), ("minimum", "second", "third_high"))
      %early_${kind} = arith.andi %${run}, %mask_6 : i8
      %late_low_${kind} = arith.andi %${third}, %mask_4 : i8
      %late_raised_${kind} = arith.shrui %${run}, %two : i8
      %late_high_${kind} = arith.andi %late_raised_${kind}, %mask_top : i8
      %late_${kind} = arith.ori %late_low_${kind}, %late_high_${kind} : i8
      %${kind}_i8 = arith.select %is_early, %early_${kind}, %late_${kind} : i8
      %${kind}_f32 = arith.uitofp %${kind}_i8 : i8 to f32
%%       endfor
      %factor = arith.mulf %d_f32, %scale_f32 : f32
${extracted("dmin_f16", "dmin", "%t, %block, %l")}
      %dmin_f32 = arith.extf %dmin_f16 : f16 to f32
      %minimum = arith.mulf %dmin_f32, %minimum_f32 : f32
      %scaled = arith.mulf %code, %factor : f32
      %weight_f32 = arith.subf %scaled, %minimum : f32
%%     endif
%%   endif
      %weight = arith.truncf %weight_f32 : f32 to ${unit}
%% endif
      linalg.yield %weight : ${unit}
    } -> ${w_type}

    // Stage 3: the product.
    %zero = arith.constant 0.0 : f32
    %product_empty = tensor.empty() : ${product_type}
    %product_init = linalg.fill ins(%zero : f32) outs(%product_empty : ${product_type}) -> ${product_type}
    %sums = linalg.generic {
        indexing_maps = [${x_map}, ${w_map}, ${product_map}],
        iterator_types = ["parallel", "parallel", "parallel", "reduction", "reduction"]}
        ins(%x_unit, %matrix : ${x_type}, ${w_type}) outs(%product_init : ${product_type})${attributes} {
    ^bb0(%activation: ${unit}, %weight: ${unit}, %sum: f32):
      %activation_f32 = arith.extf %activation : ${unit} to f32
      %weight_f32 = arith.extf %weight : ${unit} to f32
      %term = arith.mulf %activation_f32, %weight_f32 : f32
      %next = arith.addf %sum, %term : f32
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
