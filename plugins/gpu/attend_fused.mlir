// Causal attention of a known number of new tokens over a paged cache, as one attention op: iree-compile makes one
// kernel of all that stands in the dispatch, in which pages are read where they lie, tile by tile. Softmax takes one pass,
// in float32; what is multiplied is ${element}, and added up in float32.
//
// Of a prefill, matrix instructions multiply tiles of `query_tile` tokens of a head by `key_tile` positions of a page. Of
// a decode, a workgroup takes `heads_each` heads of a key head, so that these share what is read; its subgroups take
// pages in turns, and their lanes positions and columns.
//
// A mask changes scores only, and a weight of zero does not cancel a NaN: so keys and values of positions that no token
// of the row has reached are selected to zero as well, behind the gather and before the product. The two name their
// dimensions in different orders on purpose. In the same order, the compiler finds that both compare the same
// positions, and as keys and values lie differently in registers, it carries that from one to the other through shared
// memory: a tile of integers for every tile of keys.
//
// The cache is read by a dispatch that hands it on as a tied result: see paged_attention.mlir.
%% set group = heads // kv_heads
%% set grouped = "tensor<%dx%dx%dx%dx%dx" % (batch, seq, kv_heads, group, head_dim)
%% set grouped_f32 = grouped + "f32>"
%% set grouped_unit = grouped + element + ">"
%% set page = "%dx%dx%dx%s>" % (kv_heads, page_size, head_dim, element)
%% set layers_type = "tensor<?x" + page
%% set pages_type = "tensor<%dx?x%s" % (batch, page)
%% set mask_type = "tensor<%dx%dx?x%dxf32>" % (batch, seq, page_size)
%% set lengths_type = "tensor<%dxi32>" % batch
%% set argument = "!iree_tensor_ext.dispatch.tensor"
// Dimensions of the attention: row of the batch, key head, query head of it, token, column of a value and of a key,
// page, position in the page. The compiler multiplies along the last of each kind.
%% set all = "(b, h, g, m, v, k, p, t)"
// Keys and values pass through shared memory, where lanes of all four subgroups find them; queries stay in registers.
%% set by_threads = "#iree_gpu.derived_thread_config"
%% macro product(order)
mma_kind = #iree_gpu.mma_layout<${instruction}>, promote_operands = [1], promotion_types = [${by_threads}], subgroup_basis = [[1, 1, 1, 4, 1, 1, 1, 1], ${order}]
%%- endmacro
// A lane takes 8 columns, which are 16 bytes; subgroups take pages in turns.
%% set shared_out = "thread = [0, 0, 0, 0, 8, 0, 0], lane_basis = [[1, 1, 1, 1, %d, 1, %d], [0, 1, 2, 3, 4, 5, 6]], subgroup_basis = [[1, 1, 1, 1, 1, 4, 1], [0, 1, 2, 3, 4, 5, 6]]" % (head_dim // 8, key_tile)
%% macro told(config)
{compilation_info = #iree_codegen.compilation_info<lowering_config = #iree_gpu.lowering_config<{${config}}>,
            translation_info = #iree_codegen.translation_info<pipeline = #iree_gpu.pipeline<VectorDistribute>
                workgroup_size = [${4 * subgroup}, 1, 1] subgroup_size = ${subgroup},
                {iree_codegen.denormal_fp_math_f32 = #iree_codegen.denormal_fp_math<"preserve-sign">}>>}
%%- endmacro
util.func private @${symbol}(
    %query: ${query}, %cache: ${cache}, %page_table: ${table}, %positions: ${positions}, %layer: index
) -> (${query}, ${cache}) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %pages = tensor.dim %cache, %c0 : ${cache}
  %entries = tensor.dim %page_table, %c1 : ${table}

  // Stage 1: how many positions of each row are stored: one more than the largest.
  %length_empty = tensor.empty() : ${lengths_type}
  %length_init = linalg.fill ins(%zero : i32) outs(%length_empty : ${lengths_type}) -> ${lengths_type}
  %lengths = linalg.generic {
      indexing_maps = [affine_map<(b, m) -> (b, m)>, affine_map<(b, m) -> (b)>],
      iterator_types = ["parallel", "reduction"]}
      ins(%positions : ${positions}) outs(%length_init : ${lengths_type}) {
  ^bb0(%position: i32, %longest: i32):
    %length = arith.addi %position, %one : i32
    %longer = arith.maxsi %length, %longest : i32
    linalg.yield %longer : i32
  } -> ${lengths_type}

  %grouped = tensor.expand_shape %query [[0], [1], [2, 3], [4]]
      output_shape [${batch}, ${seq}, ${kv_heads}, ${group}, ${head_dim}] : ${query} into ${grouped_f32}
  %attended:2 = flow.dispatch.workgroups[%entries, %pages](
          %cache, %page_table, %lengths, %positions, %grouped, %layer, %entries, %pages)
      : (${sized(cache, "%pages")}, ${sized(table, "%entries")}, ${lengths_type}, ${positions}, ${grouped_f32}, index,
         index, index)
      -> (%cache${sizes(cache, "%pages")}, ${grouped_f32}) =
      (%cache_ref: ${argument}<readwrite:${cache}>, %table_ref: ${argument}<readonly:${table}>,
       %lengths_ref: ${argument}<readonly:${lengths_type}>, %positions_ref: ${argument}<readonly:${positions}>,
       %query_ref: ${argument}<readonly:${grouped_f32}>, %layer_arg: index, %entries_arg: index, %pages_arg: index,
       %output_ref: ${argument}<writeonly:${grouped_f32}>) {
    %entry_ordinal = iree_tensor_ext.dispatch.workload.ordinal %entries_arg, 0 : index
    // What the compiler may count on: there is at least a page.
    %entry_count = util.assume.int %entry_ordinal<umin = 1> : index
    %page_count = iree_tensor_ext.dispatch.workload.ordinal %pages_arg, 1 : index
    %cache_shaped = flow.dispatch.tie_shape %cache_ref
        : ${argument}<readwrite:${cache}>${sizes(cache, "%page_count")}
    %table_shaped = flow.dispatch.tie_shape %table_ref
        : ${argument}<readonly:${table}>${sizes(table, "%entry_count")}
    %stored = iree_tensor_ext.dispatch.tensor.load %cache_shaped, offsets = [0, 0, 0, 0, 0, 0],
        sizes = [%page_count, ${layers}, 2, ${kv_heads}, ${page_size}, ${head_dim}], strides = [1, 1, 1, 1, 1, 1]
        : ${argument}<readwrite:${cache}>${sizes(cache, "%page_count")} -> ${cache}
    %table = iree_tensor_ext.dispatch.tensor.load %table_shaped, offsets = [0, 0], sizes = [${batch}, %entry_count],
        strides = [1, 1] : ${argument}<readonly:${table}>${sizes(table, "%entry_count")} -> ${table}
    %row_lengths = iree_tensor_ext.dispatch.tensor.load %lengths_ref, offsets = [0], sizes = [${batch}],
        strides = [1] : ${argument}<readonly:${lengths_type}> -> ${lengths_type}
    %token_positions = iree_tensor_ext.dispatch.tensor.load %positions_ref, offsets = [0, 0],
        sizes = [${batch}, ${seq}], strides = [1, 1] : ${argument}<readonly:${positions}> -> ${positions}
    %queries = iree_tensor_ext.dispatch.tensor.load %query_ref, offsets = [0, 0, 0, 0, 0],
        sizes = [${batch}, ${seq}, ${kv_heads}, ${group}, ${head_dim}], strides = [1, 1, 1, 1, 1]
        : ${argument}<readonly:${grouped_f32}> -> ${grouped_f32}
    %page_size = arith.constant ${page_size} : index

    // Stage 2: queries in ${element}, scaled in float32. What is too large for it becomes the largest number that is
    // not. The compiler takes powers of two instead of e, and multiplies by log2(e) what it is given as the scale:
    // given the inverse, rounded to one by now, it has nothing left to round.
    %query_init = tensor.empty() : ${grouped_unit}
    %query_unit = linalg.generic {
        indexing_maps = [affine_map<(b, m, h, g, k) -> (b, m, h, g, k)>, affine_map<(b, m, h, g, k) -> (b, m, h, g, k)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
        ins(%queries : ${grouped_f32}) outs(%query_init : ${grouped_unit}) {
    ^bb0(%number: f32, %unused: ${element}):
      %scale = arith.constant ${scale_log2e} : f32
      %largest = arith.constant ${largest} : f32
      %least = arith.constant -${largest} : f32
      %scaled = arith.mulf %number, %scale : f32
      %bounded_above = arith.minimumf %scaled, %largest : f32
      %bounded = arith.maximumf %bounded_above, %least : f32
      %rounded = arith.truncf %bounded : f32 to ${element}
      linalg.yield %rounded : ${element}
    } -> ${grouped_unit}

    // Stage 3: keys and values, which are never stored. With page, layer and kind in one dimension an address is one
    // product, of which the compiler sees that it divides by 16 bytes.
    %flat = tensor.collapse_shape %stored [[0, 1, 2], [3], [4], [5]] : ${cache} into ${layers_type}
    %numbers_init = tensor.empty(%entry_count) : ${table}
    %pages_init = tensor.empty(%entry_count) : ${pages_type}
%% for kind, number, order in (("key", 0, "b, p, h, t, d"), ("value", 1, "t, b, p, h, d"))
    %${kind}_numbers = linalg.generic {
        indexing_maps = [affine_map<(b, p) -> (b, p)>, affine_map<(b, p) -> (b, p)>],
        iterator_types = ["parallel", "parallel"]}
        ins(%table : ${table}) outs(%numbers_init : ${table}) {
    ^bb0(%entry: i32, %unused: i32):
      %layer_i32 = arith.index_castui %layer_arg : index to i32
      %layers = arith.constant ${layers} : i32
      %kinds = arith.constant 2 : i32
      %kind = arith.constant ${number} : i32
      %first_layer = arith.muli %entry, %layers : i32
      %own_layer = arith.addi %first_layer, %layer_i32 : i32
      %first_kind = arith.muli %own_layer, %kinds : i32
      %own_kind = arith.addi %first_kind, %kind : i32
      linalg.yield %own_kind : i32
    } -> ${table}
    %${kind}_pages = iree_linalg_ext.gather dimension_map = [0]
        ins(%flat, %${kind}_numbers : ${layers_type}, ${table}) outs(%pages_init : ${pages_type}) -> ${pages_type}
    %${kind}s = linalg.generic {
        indexing_maps = [affine_map<(${order}) -> (b, p, h, t, d)>, affine_map<(${order}) -> (b)>,
                         affine_map<(${order}) -> (b, p, h, t, d)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
        ins(%${kind}_pages, %row_lengths : ${pages_type}, ${lengths_type}) outs(%pages_init : ${pages_type}) {
    ^bb0(%number: ${element}, %length: i32, %unused: ${element}):
      %p = linalg.index ${order.split(", ").index("p")} : index
      %t = linalg.index ${order.split(", ").index("t")} : index
      %start = arith.muli %p, %page_size : index
      %position = arith.addi %start, %t : index
      %position_i32 = arith.index_castui %position : index to i32
      %is_present = arith.cmpi slt, %position_i32, %length : i32
      %absent = arith.constant 0.0 : ${element}
      %number_or_zero = arith.select %is_present, %number, %absent : ${element}
      linalg.yield %number_or_zero : ${element}
    } -> ${pages_type}
%% endfor

    // Stage 4: what is added to a score: nothing, or what makes its weight zero.
    %mask_init = tensor.empty(%entry_count) : ${mask_type}
    %mask = linalg.generic {
        indexing_maps = [affine_map<(b, m, p, t) -> (b, m)>, affine_map<(b, m, p, t) -> (b, m, p, t)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
        ins(%token_positions : ${positions}) outs(%mask_init : ${mask_type}) {
    ^bb0(%token_position: i32, %unused: f32):
      %p = linalg.index 2 : index
      %t = linalg.index 3 : index
      %start = arith.muli %p, %page_size : index
      %position = arith.addi %start, %t : index
      %position_i32 = arith.index_castui %position : index to i32
      %not_later = arith.cmpi sle, %position_i32, %token_position : i32
%% if window
      %window = arith.constant ${window} : i32
      %distance = arith.subi %token_position, %position_i32 : i32
      %in_window = arith.cmpi slt, %distance, %window : i32
      %is_visible = arith.andi %not_later, %in_window : i1
%% endif
      %nothing = arith.constant 0.0 : f32
      %hiding = arith.constant 0xFF800000 : f32
      %addend = arith.select ${"%is_visible" if window else "%not_later"}, %nothing, %hiding : f32
      linalg.yield %addend : f32
    } -> ${mask_type}

    // Stage 5: attention, and how to tile it.
    %log2e_inverse = arith.constant 0.693147182 : f32
    %output_init = tensor.empty() : ${grouped_f32}
    %weighted = iree_linalg_ext.attention <indexing_maps = [
        affine_map<${all} -> (b, m, h, g, k)>, affine_map<${all} -> (b, p, h, t, k)>,
        affine_map<${all} -> (b, p, h, t, v)>, affine_map<${all} -> ()>, affine_map<${all} -> (b, m, p, t)>,
        affine_map<${all} -> (b, m, h, g, v)>]
%%- if tiling == "matrix"
, decomposition_config = {
            qk_attrs = {lowering_config = #iree_gpu.lowering_config<{${product("[0, 1, 2, 3, 5, 6, 7]")}}>},
            pv_attrs = {lowering_config = #iree_gpu.lowering_config<{${product("[0, 1, 2, 3, 4, 6, 7]")}}>}}>
        ${told("promote_operands = [1, 2], promotion_types = [%s, %s], reduction = [0, 0, 0, 0, 0, 0, 1, %d], workgroup = [1, 1, 1, %d, %d, 0, 0, 0]"
               % (by_threads, by_threads, key_tile, query_tile, head_dim))}
%%- elif tiling == "lanes"
, decomposition_config = {
            qk_attrs = {lowering_config = #iree_gpu.lowering_config<{${shared_out}}>},
            pv_attrs = {lowering_config = #iree_gpu.lowering_config<{${shared_out}}>}}>
        ${told("partial_reduction = [0, 0, 0, 0, 0, 0, 4, %d], workgroup = [1, 1, %d, 1, %d, 0, 0, 0]"
               % (key_tile, heads_each, head_dim))}
%%- else
>
%%- endif

        ins(%query_unit, %keys, %values, %log2e_inverse, %mask
            : ${grouped_unit}, ${pages_type}, ${pages_type}, f32, ${mask_type})
        outs(%output_init : ${grouped_f32}) {
    ^bb0(%score: f32):
%% if softcap
      // Of powers of two, so the cap is one too.
      %softcap = arith.constant ${softcap_log2e} : f32
      %relative = arith.divf %score, %softcap : f32
      %bent = math.tanh %relative : f32
      %capped = arith.mulf %bent, %softcap : f32
      iree_linalg_ext.yield %capped : f32
%% else
      iree_linalg_ext.yield %score : f32
%% endif
    } -> ${grouped_f32}

    // Stage 6: padding sees nothing, which the compiler divides by nothing; it gets zeros.
    %results = linalg.generic {
        indexing_maps = [affine_map<(b, m, h, g, v) -> (b, m, h, g, v)>, affine_map<(b, m, h, g, v) -> (b, m)>,
                         affine_map<(b, m, h, g, v) -> (b, m, h, g, v)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel", "parallel"]}
        ins(%weighted, %token_positions : ${grouped_f32}, ${positions}) outs(%output_init : ${grouped_f32}) {
    ^bb0(%number: f32, %token_position: i32, %unused: f32):
      %first = arith.constant 0 : i32
      %nothing = arith.constant 0.0 : f32
      %is_token = arith.cmpi sge, %token_position, %first : i32
      %result = arith.select %is_token, %number, %nothing : f32
      linalg.yield %result : f32
    } -> ${grouped_f32}
    iree_tensor_ext.dispatch.tensor.store %results, %output_ref, offsets = [0, 0, 0, 0, 0],
        sizes = [${batch}, ${seq}, ${kv_heads}, ${group}, ${head_dim}], strides = [1, 1, 1, 1, 1]
        : ${grouped_f32} -> ${argument}<writeonly:${grouped_f32}>
    flow.return
  } count(%entries_load: index, %pages_load: index) -> (index, index, index) {
    %x, %y, %z = iree_tensor_ext.dispatch.workgroup_count_from_slice(%entries_load, %pages_load)
    flow.return %x, %y, %z : index, index, index
  }
  %output = tensor.collapse_shape %attended#1 [[0], [1], [2, 3], [4]] : ${grouped_f32} into ${query}
  util.return %output, %attended#0 : ${query}, ${cache}
}
