// Attention of one new token a row over a paged cache, read where it lies; softmax in one pass, in float32.
//
// A workgroup takes `heads_each` query heads of one key head and one row, over a share of the positions: one of
// `splits`, so that a small batch keeps the device busy. Of its threads, every `lanes` in a row form a team that takes
// a position at a time. A lane of a team holds one in `lanes` of the 16-byte words of a key, and the same part of the
// queries and of the sums of values, for all heads: keys and values are read once.
//
// Each team keeps the largest score it met, the sum of exp(score - largest) and the values weighted by that. At the end
// the teams of a subgroup meet in shuffles and the subgroups in shared memory. With several splits, these three go to
// `partials`, [batch, heads, splits, head_dim + 4], and merge_attention does the rest.
%% from "macros.mlir" import executable, buffer, shared, indices, across_lanes, unpack_floats
%% set numbers = 4 if element == "f32" else 8
%% set words = head_dim // numbers
%% set parts = words // lanes
%% set quads = numbers // 4
%% set subgroups = threads // subgroup
%% set teams = threads // lanes
%% set columns = head_dim // 4
%% set blocks = heads // heads_each
%% set blocks_each = heads // kv_heads // heads_each
%% set query_type = buffer("%dx%dx%dxvector<4xf32>" % (batch, heads, columns))
%% set cache_type = buffer("?x%dx2x%dx%dx%dxvector<4xi32>" % (layers, kv_heads, page_size, words))
%% set table_type = buffer("%dx?xi32" % batch)
%% set positions_type = buffer("%dxi32" % batch)
%% set output_type = buffer("%dx%dx?x%dxvector<4xf32>" % (batch, heads, columns + 1) if splits else "%dx%dx%dxvector<4xf32>" % (batch, heads, columns))
%% set met_type = shared("%dx%dxf32" % (subgroups, heads_each))
%% set summed_type = shared("%dx%dx%dxvector<4xf32>" % (subgroups, heads_each, columns))
%% call executable(
     name,
     ["pages", "entries", "layer", "splits"],
     [("query", query_type, "", "read"),
      ("cache", cache_type, "{%pages}", "write"),
      ("table", table_type, "{%entries}", "read"),
      ("positions", positions_type, "", "read"),
      ("output", output_type, "{%splits}" if splits else "", "write")],
     threads, subgroup)
${indices([0, 1, subgroup, lanes, teams, page_size, heads_each, blocks_each, kv_heads, columns, threads] + range(parts * lanes * quads) | list)}
      %zero = arith.constant 0.0 : f32
      %zeros = arith.constant dense<0.0> : vector<4xf32>
      %lowest = arith.constant -1.0e+30 : f32
      %scale = arith.constant ${scale} : f32
      %largest = memref.alloc() : ${met_type}
      %total = memref.alloc() : ${met_type}
      %summed = memref.alloc() : ${summed_type}

      // Stage 1: which heads, which row, which of its positions.
      %row = arith.addi %workgroup_y, %c0 : index
      %first_head = arith.muli %workgroup_x, %c${heads_each} : index
      %kv_head = arith.divui %workgroup_x, %c${blocks_each} : index
      %team = arith.divui %thread, %c${lanes} : index
      %lane = arith.remui %thread, %c${lanes} : index
      %position_i32 = memref.load %positions[%row] : ${positions_type}
      %minus_one = arith.constant -1 : i32
      %one = arith.constant 1 : i32
      %token_or_none = arith.maxsi %position_i32, %minus_one : i32
      %length_i32 = arith.addi %token_or_none, %one : i32
      %length = arith.index_castui %length_i32 : i32 to index
%% if window
      %window = arith.constant ${window} : index
      %seen = arith.minui %length, %window : index
%% else
      %seen = arith.addi %length, %c0 : index
%% endif
      %unseen = arith.subi %length, %seen : index
      %share = arith.ceildivui %seen, %splits : index
      %before = arith.muli %workgroup_z, %share : index
      %start = arith.addi %unseen, %before : index
      %share_end = arith.addi %start, %share : index
      %end = arith.minui %share_end, %length : index
      %last = arith.subi %end, %c1 : index

      // Stage 2: this lane's part of the queries, scaled.
      %scales = vector.broadcast %scale : f32 to vector<4xf32>
%% for head in range(heads_each)
      %head${head} = arith.addi %first_head, %c${head} : index
%%   for part in range(parts)
%%     for quad in range(quads)
      %query_at_${head}_${part}_${quad} = affine.apply
          affine_map<(lane) -> (lane * ${quads} + ${part * lanes * quads + quad})>(%lane)
      %query_raw_${head}_${part}_${quad} = memref.load
          %query[%row, %head${head}, %query_at_${head}_${part}_${quad}] : ${query_type}
      %query_${head}_${part}_${quad} = arith.mulf %query_raw_${head}_${part}_${quad}, %scales : vector<4xf32>
%%     endfor
%%   endfor
%% endfor

      // Stage 3: one position a team and round. All teams make all rounds, as lanes that shuffle have to be together:
      // those that are past the end look at the last position again, and give it no weight.
%% set state = []
%% for head in range(heads_each)
%%   set _ = state.append(("largest_%d" % head, "%lowest", "f32"))
%%   set _ = state.append(("total_%d" % head, "%zero", "f32"))
%%   for part in range(parts)
%%     for quad in range(quads)
%%       set _ = state.append(("sum_%d_%d_%d" % (head, part, quad), "%zeros", "vector<4xf32>"))
%%     endfor
%%   endfor
%% endfor
      %met:${state | length} = scf.for %round = %start to %end step %c${teams}
          iter_args(
%%- for variable, initial, _ in state
%${variable} = ${initial}${", " if not loop.last else ""}
%%- endfor
)
          -> (${state | map(attribute=2) | join(", ")}) {
        %wanted = arith.addi %round, %team : index
        %is_present = arith.cmpi ult, %wanted, %end : index
        %position = arith.minui %wanted, %last : index
        %entry = arith.divui %position, %c${page_size} : index
        %slot = arith.remui %position, %c${page_size} : index
        %page_i32 = memref.load %table[%row, %entry] : ${table_type}
        %page = arith.index_castui %page_i32 : i32 to index
%% for kind, number in (("key", 0), ("value", 1))
%%   for part in range(parts)
        %${kind}_at_${part} = affine.apply affine_map<(lane) -> (lane + ${part * lanes})>(%lane)
        %${kind}_words_${part} = memref.load
            %cache[%page, %layer, %c${number}, %kv_head, %slot, %${kind}_at_${part}] : ${cache_type}
${unpack_floats("%s_%d" % (kind, part), "%%%s_words_%d" % (kind, part), element)}
%%   endfor
%% endfor
%% for head in range(heads_each)
%%   for part in range(parts)
%%     for quad in range(quads)
%%       set before = "%zeros" if part == 0 and quad == 0 else "%%dot_%d_%d" % (head, part * quads + quad - 1)
        %dot_${head}_${part * quads + quad} = math.fma %query_${head}_${part}_${quad}, %key_${part}_${quad},
            ${before} : vector<4xf32>
%%     endfor
%%   endfor
        %part_${head} = vector.reduction <add>, %dot_${head}_${parts * quads - 1} : vector<4xf32> into f32
${across_lanes("score_%d" % head, "%%part_%d" % head, "arith.addf", 1, lanes, subgroup)}
%%   if softcap
        %softcap_${head} = arith.constant ${softcap} : f32
        %relative_${head} = arith.divf %score_${head}, %softcap_${head} : f32
        %bent_${head} = math.tanh %relative_${head} : f32
        %capped_${head} = arith.mulf %bent_${head}, %softcap_${head} : f32
%%   endif
        %shown_${head} = arith.select %is_present, ${"%capped_" if softcap else "%score_"}${head}, %lowest : f32
        %now_largest_${head} = arith.maximumf %largest_${head}, %shown_${head} : f32
        %decrease_${head} = arith.subf %largest_${head}, %now_largest_${head} : f32
        %decay_${head} = math.exp %decrease_${head} : f32
        %excess_${head} = arith.subf %shown_${head}, %now_largest_${head} : f32
        %exp_${head} = math.exp %excess_${head} : f32
        %weight_${head} = arith.select %is_present, %exp_${head}, %zero : f32
        %now_total_${head} = math.fma %total_${head}, %decay_${head}, %weight_${head} : f32
        %decays_${head} = vector.broadcast %decay_${head} : f32 to vector<4xf32>
        %weights_${head} = vector.broadcast %weight_${head} : f32 to vector<4xf32>
%%   for part in range(parts)
%%     for quad in range(quads)
        %kept_${head}_${part}_${quad} = arith.mulf %sum_${head}_${part}_${quad}, %decays_${head} : vector<4xf32>
        %now_sum_${head}_${part}_${quad} = math.fma %weights_${head}, %value_${part}_${quad},
            %kept_${head}_${part}_${quad} : vector<4xf32>
%%     endfor
%%   endfor
%% endfor
        scf.yield
%%- for variable, _, _ in state
 %now_${variable}${"," if not loop.last else ""}
%%- endfor
 : ${state | map(attribute=2) | join(", ")}
      }

      // Stage 4: the teams of a subgroup agree on the largest score and add up.
      %subgroup_number = arith.divui %thread, %c${subgroup} : index
      %lane_in_subgroup = arith.remui %thread, %c${subgroup} : index
      %is_first_team = arith.cmpi ult, %lane_in_subgroup, %c${lanes} : index
%% set per_head = 2 + parts * quads
%% for head in range(heads_each)
%%   set first = head * per_head
${across_lanes("top_%d" % head, "%%met#%d" % first, "arith.maximumf", lanes, subgroup, subgroup)}
      %below_${head} = arith.subf %met#${first}, %top_${head} : f32
      %factor_${head} = math.exp %below_${head} : f32
      %own_${head} = arith.mulf %met#${first + 1}, %factor_${head} : f32
${across_lanes("all_%d" % head, "%%own_%d" % head, "arith.addf", lanes, subgroup, subgroup)}
      %factors_${head} = vector.broadcast %factor_${head} : f32 to vector<4xf32>
%%   for part in range(parts)
%%     for quad in range(quads)
%%       set id = "%d_%d_%d" % (head, part, quad)
      %scaled_${id} = arith.mulf %met#${first + 2 + part * quads + quad}, %factors_${head} : vector<4xf32>
%%       for column in range(4)
      %scaled_${id}_${column} = vector.extract %scaled_${id}[${column}] : f32 from vector<4xf32>
${across_lanes("joined_%s_%d" % (id, column), "%%scaled_%s_%d" % (id, column), "arith.addf", lanes, subgroup, subgroup)}
%%       endfor
      %joined_${id} = vector.from_elements %joined_${id}_0, %joined_${id}_1, %joined_${id}_2, %joined_${id}_3
          : vector<4xf32>
%%     endfor
%%   endfor
%% endfor
      scf.if %is_first_team {
%% for head in range(heads_each)
        memref.store %top_${head}, %largest[%subgroup_number, %c${head}] : ${met_type}
        memref.store %all_${head}, %total[%subgroup_number, %c${head}] : ${met_type}
%%   for part in range(parts)
%%     for quad in range(quads)
        memref.store %joined_${head}_${part}_${quad},
            %summed[%subgroup_number, %c${head}, %query_at_${head}_${part}_${quad}] : ${summed_type}
%%     endfor
%%   endfor
%% endfor
      }
      gpu.barrier

      // Stage 5: a thread joins, over the subgroups, 4 columns of a head at a time.
      %outputs = arith.constant ${heads_each * columns} : index
      scf.for %number = %thread to %outputs step %c${threads} {
        %head = arith.divui %number, %c${columns} : index
        %column = arith.remui %number, %c${columns} : index
%% for member in range(subgroups)
        %member${member} = arith.constant ${member} : index
        %met_largest_${member} = memref.load %largest[%member${member}, %head] : ${met_type}
        %upto_${member} = arith.maximumf %met_largest_${member},
            ${"%met_largest_" if member < 2 else "%upto_"}${[member - 1, 0] | max} : f32
%% endfor
%% for member in range(subgroups)
        %part_below_${member} = arith.subf %met_largest_${member}, %upto_${subgroups - 1} : f32
        %part_factor_${member} = math.exp %part_below_${member} : f32
        %met_total_${member} = memref.load %total[%member${member}, %head] : ${met_type}
        %met_sum_${member} = memref.load %summed[%member${member}, %head, %column] : ${summed_type}
        %part_factors_${member} = vector.broadcast %part_factor_${member} : f32 to vector<4xf32>
        %now_total_${member} = math.fma %part_factor_${member}, %met_total_${member},
            ${"%%now_total_%d" % (member - 1) if member else "%zero"} : f32
        %now_sum_${member} = math.fma %part_factors_${member}, %met_sum_${member},
            ${"%%now_sum_%d" % (member - 1) if member else "%zeros"} : vector<4xf32>
%% endfor
        %query_head = arith.addi %first_head, %head : index
%% set end = subgroups - 1
%% if splits
        memref.store %now_sum_${end}, %output[%row, %query_head, %workgroup_z, %column] : ${output_type}
        %is_first_column = arith.cmpi eq, %column, %c0 : index
        scf.if %is_first_column {
          %columns = arith.constant ${columns} : index
          %tail = vector.from_elements %upto_${end}, %now_total_${end}, %zero, %zero : vector<4xf32>
          memref.store %tail, %output[%row, %query_head, %workgroup_z, %columns] : ${output_type}
        }
%% else
        // A row that is idle has met nothing, and gets zeros.
        %is_empty = arith.cmpf oeq, %now_total_${end}, %zero : f32
        %unit = arith.constant 1.0 : f32
        %divisor = arith.select %is_empty, %unit, %now_total_${end} : f32
        %divisors = vector.broadcast %divisor : f32 to vector<4xf32>
        %result = arith.divf %now_sum_${end}, %divisors : vector<4xf32>
        memref.store %result, %output[%row, %query_head, %column] : ${output_type}
%% endif
      }
%% endcall
