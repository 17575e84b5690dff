// A whole "model" with the signature of an exported step, small enough to compile in a second.
//
// It writes every new token to the cache, key and value = (token, position), then reads back through the page table
// every token of the row: state = sum of token * (position + 1), modulo the vocabulary. The logits are row `state` of a
// matrix in the parameter archive. So the answer depends on each token, on its place, on the page table and on the
// archive, and on nothing else.
//
// `conftest.py` puts it together: types and function once for each batch size, around the module's head. It fills in
// PHASE, BATCH, VOCAB, SEQ (`?` or 1) and SEQ_SIZE (the operand that tensor.empty needs for a dynamic SEQ).

!tokens_${BATCH} = tensor<${BATCH}x${SEQ}xi32>
!rows_${BATCH} = tensor<${BATCH}xi32>
!table_${BATCH} = tensor<${BATCH}x?xi32>
!cache_${BATCH} = tensor<?x1x2x1x4x2xf32>
!updates_${BATCH} = tensor<${BATCH}x${SEQ}x2x2xf32>
!indices_${BATCH} = tensor<${BATCH}x${SEQ}x2x5xi32>
!mask_${BATCH} = tensor<${BATCH}x${SEQ}x2xi1>
!logits_${BATCH} = tensor<${BATCH}x${VOCAB}xf32>
!best_${BATCH} = tensor<${BATCH}xf32>

// ----- head
module @${PHASE} {
  util.global private @weights = #flow.parameter.named<"model"::"table"> : tensor<${VOCAB}x${VOCAB}xf32>

// ----- function
  func.func @${PHASE}_bs${BATCH}(%tokens: !tokens_${BATCH}, %starts: !rows_${BATCH}, %lengths: !rows_${BATCH},
      %table: !table_${BATCH}, %cache: !cache_${BATCH})
      -> (!logits_${BATCH}, !rows_${BATCH}, !cache_${BATCH}) {
    %c0 = arith.constant 0 : index
    %c1 = arith.constant 1 : index
    %c4 = arith.constant 4 : index
    %zero = arith.constant 0 : i32
    %one = arith.constant 1 : i32
    %lowest = arith.constant 0xFF800000 : f32
    %modulus = arith.constant ${VOCAB} : i32
    %seq = tensor.dim %tokens, %c1 : !tokens_${BATCH}
    %seq_i32 = arith.index_cast %seq : index to i32

    // What is written: [batch, seq, (key, value), head_dim], one slice of head_dim for each index.
    %updates_empty = tensor.empty(${SEQ_SIZE}) : !updates_${BATCH}
    %updates = linalg.generic {
        indexing_maps = [affine_map<(b, s, n, d) -> (b, s)>, affine_map<(b, s, n, d) -> (b)>,
                         affine_map<(b, s, n, d) -> (b)>, affine_map<(b, s, n, d) -> (b, s, n, d)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
        ins(%tokens, %starts, %lengths : !tokens_${BATCH}, !rows_${BATCH}, !rows_${BATCH})
        outs(%updates_empty : !updates_${BATCH}) {
      ^bb0(%token: i32, %start: i32, %length: i32, %out: f32):
        %column = linalg.index 1 : index
        %d = linalg.index 3 : index
        %column_i32 = arith.index_cast %column : index to i32
        %padding = arith.subi %seq_i32, %length : i32
        %offset = arith.subi %column_i32, %padding : i32
        %position = arith.addi %start, %offset : i32
        %is_token = arith.cmpi eq, %d, %c0 : index
        %chosen = arith.select %is_token, %token, %position : i32
        %value = arith.sitofp %chosen : i32 to f32
        linalg.yield %value : f32
    } -> !updates_${BATCH}

    // Where it is written: (page, layer, key or value, head, slot).
    %indices_empty = tensor.empty(${SEQ_SIZE}) : !indices_${BATCH}
    %indices = linalg.generic {
        indexing_maps = [affine_map<(b, s, n, i) -> (b)>, affine_map<(b, s, n, i) -> (b)>,
                         affine_map<(b, s, n, i) -> (b, s, n, i)>],
        iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
        ins(%starts, %lengths : !rows_${BATCH}, !rows_${BATCH}) outs(%indices_empty : !indices_${BATCH}) {
      ^bb0(%start: i32, %length: i32, %out: i32):
        %row = linalg.index 0 : index
        %column = linalg.index 1 : index
        %n = linalg.index 2 : index
        %i = linalg.index 3 : index
        %column_i32 = arith.index_cast %column : index to i32
        %padding = arith.subi %seq_i32, %length : i32
        %offset = arith.subi %column_i32, %padding : i32
        %position = arith.addi %start, %offset : i32
        // Padding has no position; clamp, so that the table is not read out of bounds. The mask drops the write.
        %clamped = arith.maxsi %position, %zero : i32
        %position_index = arith.index_cast %clamped : i32 to index
        %entry = arith.divui %position_index, %c4 : index
        %slot = arith.remui %position_index, %c4 : index
        %entries = tensor.dim %table, %c1 : !table_${BATCH}
        %last = arith.subi %entries, %c1 : index
        %safe_entry = arith.minui %entry, %last : index
        %page = tensor.extract %table[%row, %safe_entry] : !table_${BATCH}
        %n_i32 = arith.index_cast %n : index to i32
        %slot_i32 = arith.index_cast %slot : index to i32
        %is_page = arith.cmpi eq, %i, %c0 : index
        %c2 = arith.constant 2 : index
        %is_kv = arith.cmpi eq, %i, %c2 : index
        %is_slot = arith.cmpi eq, %i, %c4 : index
        %a = arith.select %is_page, %page, %zero : i32
        %b = arith.select %is_kv, %n_i32, %a : i32
        %c = arith.select %is_slot, %slot_i32, %b : i32
        linalg.yield %c : i32
    } -> !indices_${BATCH}

    %mask_empty = tensor.empty(${SEQ_SIZE}) : !mask_${BATCH}
    %mask = linalg.generic {
        indexing_maps = [affine_map<(b, s, n) -> (b)>, affine_map<(b, s, n) -> (b, s, n)>],
        iterator_types = ["parallel", "parallel", "parallel"]}
        ins(%lengths : !rows_${BATCH}) outs(%mask_empty : !mask_${BATCH}) {
      ^bb0(%length: i32, %out: i1):
        %column = linalg.index 1 : index
        %column_i32 = arith.index_cast %column : index to i32
        %padding = arith.subi %seq_i32, %length : i32
        %is_new = arith.cmpi sge, %column_i32, %padding : i32
        linalg.yield %is_new : i1
    } -> !mask_${BATCH}

    %filled = iree_linalg_ext.scatter dimension_map = [0, 1, 2, 3, 4] unique_indices(true)
        ins(%updates, %indices, %mask
            : !updates_${BATCH}, !indices_${BATCH}, !mask_${BATCH})
        outs(%cache : !cache_${BATCH}) {
      ^bb0(%new: f32, %old: f32):
        iree_linalg_ext.yield %new : f32
    } -> !cache_${BATCH}

    // What the row holds now, read back through the page table.
    %slots = tensor.empty() : tensor<4xf32>
    %sum_empty = tensor.empty() : !rows_${BATCH}
    %sum_zero = linalg.fill ins(%zero : i32) outs(%sum_empty : !rows_${BATCH}) -> !rows_${BATCH}
    %sum = linalg.generic {
        indexing_maps = [affine_map<(b, p, s) -> (b, p)>, affine_map<(b, p, s) -> (b)>, affine_map<(b, p, s) -> (b)>,
                         affine_map<(b, p, s) -> (s)>, affine_map<(b, p, s) -> (b)>],
        iterator_types = ["parallel", "reduction", "reduction"]}
        ins(%table, %starts, %lengths, %slots : !table_${BATCH}, !rows_${BATCH}, !rows_${BATCH}, tensor<4xf32>)
        outs(%sum_zero : !rows_${BATCH}) {
      ^bb0(%page: i32, %start: i32, %length: i32, %unused: f32, %partial: i32):
        %entry = linalg.index 1 : index
        %slot = linalg.index 2 : index
        %page_index = arith.index_cast %page : i32 to index
        %first = arith.muli %entry, %c4 : index
        %position_index = arith.addi %first, %slot : index
        %position = arith.index_cast %position_index : index to i32
        %end = arith.addi %start, %length : i32
        %is_held = arith.cmpi slt, %position, %end : i32
        %key = tensor.extract %filled[%page_index, %c0, %c0, %c0, %slot, %c0] : !cache_${BATCH}
        %token = arith.fptosi %key : f32 to i32
        %weight = arith.addi %position, %one : i32
        %term = arith.muli %token, %weight : i32
        %held = arith.select %is_held, %term, %zero : i32
        %total = arith.addi %partial, %held : i32
        linalg.yield %total : i32
    } -> !rows_${BATCH}

    %matrix = util.global.load @weights : tensor<${VOCAB}x${VOCAB}xf32>
    %logits_empty = tensor.empty() : !logits_${BATCH}
    %logits = linalg.generic {
        indexing_maps = [affine_map<(b, v) -> (b)>, affine_map<(b, v) -> (b, v)>],
        iterator_types = ["parallel", "parallel"]}
        ins(%sum : !rows_${BATCH}) outs(%logits_empty : !logits_${BATCH}) {
      ^bb0(%state: i32, %out: f32):
        %v = linalg.index 1 : index
        %remainder = arith.remsi %state, %modulus : i32
        %row = arith.index_cast %remainder : i32 to index
        %logit = tensor.extract %matrix[%row, %v] : tensor<${VOCAB}x${VOCAB}xf32>
        linalg.yield %logit : f32
    } -> !logits_${BATCH}

    %best_empty = tensor.empty() : !best_${BATCH}
    %best_lowest = linalg.fill ins(%lowest : f32) outs(%best_empty : !best_${BATCH}) -> !best_${BATCH}
    %argmax:2 = linalg.generic {
        indexing_maps = [affine_map<(b, v) -> (b, v)>, affine_map<(b, v) -> (b)>, affine_map<(b, v) -> (b)>],
        iterator_types = ["parallel", "reduction"]}
        ins(%logits : !logits_${BATCH}) outs(%best_lowest, %sum_zero : !best_${BATCH}, !rows_${BATCH}) {
      ^bb0(%logit: f32, %best: f32, %best_index: i32):
        %v = linalg.index 1 : index
        %v_i32 = arith.index_cast %v : index to i32
        %better = arith.cmpf ogt, %logit, %best : f32
        %value = arith.select %better, %logit, %best : f32
        %index = arith.select %better, %v_i32, %best_index : i32
        linalg.yield %value, %index : f32, i32
    } -> (!best_${BATCH}, !rows_${BATCH})

    return %logits, %argmax#1, %filled : !logits_${BATCH}, !rows_${BATCH}, !cache_${BATCH}
  }
