// Causal attention of many new tokens a row over a paged cache; softmax in one pass, in float32.
//
// A workgroup takes one key head of one row of the batch, and `rows_each` of the queries that share it: those of all
// heads of a token, then those of the next. Of its threads, every `lanes` in a row form a team that takes
// `rows_per_team` queries; a lane of a team holds 4 in every 4 * `lanes` columns of them, and of the sums of values.
//
// All walk together over the positions, `tile` at a time: threads copy the keys and values of a tile from their pages
// to shared memory, as float32, then each team multiplies its queries with `step` keys at a time.
%% from "macros.mlir" import executable, buffer, shared, indices, across_lanes, unpack_floats
%% set numbers = 4 if element == "f32" else 8
%% set words = head_dim // numbers
%% set quads = numbers // 4
%% set columns = head_dim // 4
%% set parts = columns // lanes
%% set teams = threads // lanes
%% set group = heads // kv_heads
%% set subgroups = threads // subgroup
%% set query_type = buffer("%dx?x%dx%dxvector<4xf32>" % (batch, heads, columns))
%% set cache_type = buffer("?x%dx2x%dx%dx%dxvector<4xi32>" % (layers, kv_heads, page_size, words))
%% set table_type = buffer("%dx?xi32" % batch)
%% set positions_type = buffer("%dx?xi32" % batch)
%% set tile_type = shared("%dx%dxvector<4xf32>" % (tile, columns))
%% set bounds_type = shared("%dx2xf32" % subgroups)
%% call executable(
     name,
     ["pages", "seq", "entries", "layer"],
     [("query", query_type, "{%seq}", "read"),
      ("cache", cache_type, "{%pages}", "write"),
      ("table", table_type, "{%entries}", "read"),
      ("positions", positions_type, "{%seq}", "read"),
      ("output", query_type, "{%seq}", "write")],
     threads, subgroup)
${indices([0, 1, group, lanes, teams, page_size, words, tile, step, threads, subgroup, rows_each] + range(subgroups) | list)}
      %zero = arith.constant 0.0 : f32
      %zeros = arith.constant dense<0.0> : vector<4xf32>
      %lowest = arith.constant -1.0e+30 : f32
      %scale = arith.constant ${scale} : f32
      %scales = vector.broadcast %scale : f32 to vector<4xf32>
      %minus_one = arith.constant -1 : i32
      %keys = memref.alloc() : ${tile_type}
      %values = memref.alloc() : ${tile_type}
      %bounds = memref.alloc() : ${bounds_type}
      %kv_head = arith.addi %workgroup_y, %c0 : index
      %row = arith.addi %workgroup_z, %c0 : index

      // Stage 1: the queries of this team, scaled, and from where to where they see. Past the end it takes the last
      // query again, and does not store it.
      %team = arith.divui %thread, %c${lanes} : index
      %lane = arith.remui %thread, %c${lanes} : index
      %first = arith.muli %workgroup_x, %c${rows_each} : index
      %queries = arith.muli %seq, %c${group} : index
      %last_query = arith.subi %queries, %c1 : index
      %first_head = arith.muli %kv_head, %c${group} : index
%% for part in range(parts)
      %column_${part} = affine.apply affine_map<(lane) -> (lane + ${part * lanes})>(%lane)
%% endfor
%% for mine in range(rows_per_team)
      %wanted_${mine} = affine.apply affine_map<(first, team) -> (first + team + ${mine * teams})>(%first, %team)
      %is_inside_${mine} = arith.cmpi ult, %wanted_${mine}, %queries : index
      %number_${mine} = arith.minui %wanted_${mine}, %last_query : index
      %token_${mine} = arith.divui %number_${mine}, %c${group} : index
      %member_${mine} = arith.remui %number_${mine}, %c${group} : index
      %head_${mine} = arith.addi %first_head, %member_${mine} : index
      %position_${mine} = memref.load %positions[%row, %token_${mine}] : ${positions_type}
      %position_or_none_${mine} = arith.maxsi %position_${mine}, %minus_one : i32
%%   if window
      %window_${mine} = arith.constant ${window} : i32
      %unseen_${mine} = arith.subi %position_or_none_${mine}, %window_${mine} : i32
%%   else
      %unseen_${mine} = arith.constant -1 : i32
%%   endif
%%   for part in range(parts)
      %query_raw_${mine}_${part} = memref.load %query[%row, %token_${mine}, %head_${mine}, %column_${part}] : ${query_type}
      %query_${mine}_${part} = arith.mulf %query_raw_${mine}_${part}, %scales : vector<4xf32>
%%   endfor
%% endfor

      // Stage 2: what the workgroup sees, from the first position of any to the last of any. Positions are exact as
      // floats up to 2 ** 24.
%% for mine in range(rows_per_team)
      %end_${mine} = arith.sitofp %position_or_none_${mine} : i32 to f32
      %begin_${mine} = arith.sitofp %unseen_${mine} : i32 to f32
%% endfor
%% for mine in range(1, rows_per_team)
      %latest_end_${mine} = arith.maximumf ${"%end_0" if mine == 1 else "%latest_end_" ~ (mine - 1)}, %end_${mine} : f32
      %earliest_begin_${mine} = arith.minimumf ${"%begin_0" if mine == 1 else "%earliest_begin_" ~ (mine - 1)}, %begin_${mine} : f32
%% endfor
%% set own_end = "%latest_end_" ~ (rows_per_team - 1) if rows_per_team > 1 else "%end_0"
%% set own_begin = "%earliest_begin_" ~ (rows_per_team - 1) if rows_per_team > 1 else "%begin_0"
${across_lanes("subgroup_end", own_end, "arith.maximumf", 1, subgroup, subgroup)}
${across_lanes("subgroup_begin", own_begin, "arith.minimumf", 1, subgroup, subgroup)}
      %subgroup_number = arith.divui %thread, %c${subgroup} : index
      memref.store %subgroup_end, %bounds[%subgroup_number, %c0] : ${bounds_type}
      memref.store %subgroup_begin, %bounds[%subgroup_number, %c1] : ${bounds_type}
      gpu.barrier
%% for member in range(subgroups)
      %end_of_${member} = memref.load %bounds[%c${member}, %c0] : ${bounds_type}
      %begin_of_${member} = memref.load %bounds[%c${member}, %c1] : ${bounds_type}
      %end_upto_${member} = arith.maximumf %end_of_${member}, ${"%end_of_0" if member < 2 else "%end_upto_" ~ (member - 1)} : f32
      %begin_upto_${member} = arith.minimumf %begin_of_${member}, ${"%begin_of_0" if member < 2 else "%begin_upto_" ~ (member - 1)} : f32
%% endfor
      %one_i32 = arith.constant 1 : i32
      %zero_i32 = arith.constant 0 : i32
      %last_i32 = arith.fptosi %end_upto_${subgroups - 1} : f32 to i32
      %end_i32 = arith.addi %last_i32, %one_i32 : i32
      %end = arith.index_castui %end_i32 : i32 to index
      %last = arith.subi %end, %c1 : index
      %before_i32 = arith.fptosi %begin_upto_${subgroups - 1} : f32 to i32
      %next_i32 = arith.addi %before_i32, %one_i32 : i32
      %begin_i32 = arith.maxsi %next_i32, %zero_i32 : i32
      %begin = arith.index_castui %begin_i32 : i32 to index

      // Stage 3: tile by tile.
%% set state = []
%% for mine in range(rows_per_team)
%%   set _ = state.append(("largest_%d" % mine, "%lowest", "f32"))
%%   set _ = state.append(("total_%d" % mine, "%zero", "f32"))
%%   for part in range(parts)
%%     set _ = state.append(("sum_%d_%d" % (mine, part), "%zeros", "vector<4xf32>"))
%%   endfor
%% endfor
%% set types = state | map(attribute=2) | join(", ")
      %met:${state | length} = scf.for %tile_start = %begin to %end step %c${tile}
          iter_args(
%%- for variable, initial, _ in state
%tile_${variable} = ${initial}${", " if not loop.last else ""}
%%- endfor
)
          -> (${types}) {
        // What lies past the end is zero here whatever the page holds, as a weight of zero does not cancel a NaN.
        %tile_words = arith.constant ${tile * words} : index
        scf.for %number = %thread to %tile_words step %c${threads} {
          %key_number = arith.divui %number, %c${words} : index
          %word = arith.remui %number, %c${words} : index
          %wanted = arith.addi %tile_start, %key_number : index
          %is_present = arith.cmpi ult, %wanted, %end : index
          // A vector, as the SPIR-V of some targets selects vectors by vectors only.
          %are_present = vector.broadcast %is_present : i1 to vector<4xi1>
          %position = arith.minui %wanted, %last : index
          %entry = arith.divui %position, %c${page_size} : index
          %slot = arith.remui %position, %c${page_size} : index
          %page_i32 = memref.load %table[%row, %entry] : ${table_type}
          %page = arith.index_castui %page_i32 : i32 to index
%% for kind in ("key", "value")
          %${kind}_words = memref.load %cache[%page, %layer, %c${loop.index0}, %kv_head, %slot, %word] : ${cache_type}
${unpack_floats(kind, "%%%s_words" % kind, element)}
%%   for quad in range(quads)
          %${kind}_column_${quad} = affine.apply affine_map<(word) -> (word * ${quads} + ${quad})>(%word)
          %${kind}_or_zero_${quad} = arith.select %are_present, %${kind}_${quad}, %zeros : vector<4xi1>, vector<4xf32>
          memref.store %${kind}_or_zero_${quad}, %${kind}s[%key_number, %${kind}_column_${quad}] : ${tile_type}
%%   endfor
%% endfor
        }
        gpu.barrier
        %tile_met:${state | length} = scf.for %key_start = %c0 to %c${tile} step %c${step}
            iter_args(
%%- for variable, _, _ in state
%${variable} = %tile_${variable}${", " if not loop.last else ""}
%%- endfor
)
            -> (${types}) {
          // Scores.
%% for key in range(step)
          %key_at_${key} = affine.apply affine_map<(start) -> (start + ${key})>(%key_start)
          %position_of_${key} = arith.addi %tile_start, %key_at_${key} : index
          %key_position_${key} = arith.index_castui %position_of_${key} : index to i32
%%   for part in range(parts)
          %key_${key}_${part} = memref.load %keys[%key_at_${key}, %column_${part}] : ${tile_type}
%%   endfor
%%   for mine in range(rows_per_team)
%%     set id = "%d_%d" % (mine, key)
%%     for part in range(parts)
          %dot_${id}_${part} = math.fma %query_${mine}_${part}, %key_${key}_${part},
              ${"%%dot_%s_%d" % (id, part - 1) if part else "%zeros"} : vector<4xf32>
%%     endfor
          %part_${id} = vector.reduction <add>, %dot_${id}_${parts - 1} : vector<4xf32> into f32
${across_lanes("score_" ~ id, "%part_" ~ id, "arith.addf", 1, lanes, subgroup)}
%%     if softcap
          %softcap_${id} = arith.constant ${softcap} : f32
          %relative_${id} = arith.divf %score_${id}, %softcap_${id} : f32
          %bent_${id} = math.tanh %relative_${id} : f32
          %capped_${id} = arith.mulf %bent_${id}, %softcap_${id} : f32
%%     endif
          %is_not_later_${id} = arith.cmpi sle, %key_position_${key}, %position_or_none_${mine} : i32
          %is_not_past_${id} = arith.cmpi sgt, %key_position_${key}, %unseen_${mine} : i32
          %is_seen_${id} = arith.andi %is_not_later_${id}, %is_not_past_${id} : i1
          %shown_${id} = arith.select %is_seen_${id}, ${"%capped_" if softcap else "%score_"}${id}, %lowest : f32
%%   endfor
%% endfor
          // The softmax so far: rescaled once for all ${step} keys.
%% for mine in range(rows_per_team)
%%   for key in range(step)
          %largest_${mine}_${key} = arith.maximumf ${"%%largest_%d_%d" % (mine, key - 1) if key else "%%largest_%d" % mine},
              %shown_${mine}_${key} : f32
%%   endfor
          %now_largest_${mine} = arith.bitcast %largest_${mine}_${step - 1} : f32 to f32
          %decrease_${mine} = arith.subf %largest_${mine}, %now_largest_${mine} : f32
          %decay_${mine} = math.exp %decrease_${mine} : f32
          %decays_${mine} = vector.broadcast %decay_${mine} : f32 to vector<4xf32>
          %kept_total_${mine} = arith.mulf %total_${mine}, %decay_${mine} : f32
%%   for key in range(step)
%%     set id = "%d_%d" % (mine, key)
          %excess_${id} = arith.subf %shown_${id}, %now_largest_${mine} : f32
          %exp_${id} = math.exp %excess_${id} : f32
          %weight_${id} = arith.select %is_seen_${id}, %exp_${id}, %zero : f32
          %weights_${id} = vector.broadcast %weight_${id} : f32 to vector<4xf32>
          %total_upto_${id} = arith.addf ${"%%total_upto_%d_%d" % (mine, key - 1) if key else "%%kept_total_%d" % mine},
              %weight_${id} : f32
%%   endfor
          %now_total_${mine} = arith.bitcast %total_upto_${mine}_${step - 1} : f32 to f32
%%   for part in range(parts)
          %kept_${mine}_${part} = arith.mulf %sum_${mine}_${part}, %decays_${mine} : vector<4xf32>
%%   endfor
%% endfor
          // The values.
%% for key in range(step)
%%   for part in range(parts)
          %value_${key}_${part} = memref.load %values[%key_at_${key}, %column_${part}] : ${tile_type}
%%     for mine in range(rows_per_team)
          ${"%%now_sum_%d_%d" % (mine, part) if key == step - 1 else "%%sum_upto_%d_%d_%d" % (mine, part, key)} = math.fma
              %weights_${mine}_${key}, %value_${key}_${part},
              ${"%%sum_upto_%d_%d_%d" % (mine, part, key - 1) if key else "%%kept_%d_%d" % (mine, part)} : vector<4xf32>
%%     endfor
%%   endfor
%% endfor
          scf.yield
%%- for variable, _, _ in state
 %now_${variable}${"," if not loop.last else ""}
%%- endfor
 : ${types}
        }
        gpu.barrier
        scf.yield
%%- for _ in state
 %tile_met#${loop.index0}${"," if not loop.last else ""}
%%- endfor
 : ${types}
      }

      // Stage 4: what each query saw; padding, which saw nothing, gets zeros.
%% for mine in range(rows_per_team)
%%   set first_met = mine * (2 + parts)
      %is_empty_${mine} = arith.cmpf oeq, %met#${first_met + 1}, %zero : f32
      %unit_${mine} = arith.constant 1.0 : f32
      %divisor_${mine} = arith.select %is_empty_${mine}, %unit_${mine}, %met#${first_met + 1} : f32
      %divisors_${mine} = vector.broadcast %divisor_${mine} : f32 to vector<4xf32>
      scf.if %is_inside_${mine} {
%%   for part in range(parts)
        %result_${mine}_${part} = arith.divf %met#${first_met + 2 + part}, %divisors_${mine} : vector<4xf32>
        memref.store %result_${mine}_${part},
            %output[%row, %token_${mine}, %head_${mine}, %column_${part}] : ${query_type}
%%   endfor
      }
%% endfor
%% endcall
