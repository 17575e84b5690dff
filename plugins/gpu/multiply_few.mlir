// y = x * w^T for a row or a few, by weights in tiles of 16 rows: every weight is read once, and unpacked once for all
// rows of x.
//
// A workgroup takes one tile, so 16 columns of y, and `rows_each` rows of x. Of its threads, 16 in a row form a team
// that takes a group of 32 columns at a time: a lane of it unpacks 4 rows of 8 columns and multiplies them with each
// row of x. Lanes with the same 4 rows are added up at the end, in shuffles within a subgroup, then in shared memory.
%% from "macros.mlir" import executable, buffer, shared, indices, across_lanes
%% from "weights.mlir" import weights, with_minima, plain
%% set teams = threads // 16
%% set subgroups = threads // subgroup
%% set x_type = buffer("%dx%dx4x2xvector<4xf32>" % (rows, groups))
%% set is_whole = out_features % 4 == 0
%% set y_type = buffer("%dx%dxvector<4xf32>" % (rows, out_features // 4) if is_whole else "%dx%dxf32" % (rows, out_features))
%% set sums_type = shared("%dx%dx4xvector<4xf32>" % (subgroups, rows_each))
%% set bindings = [("x", x_type, "", "read")]
%% set types = {}
%% for plane, shape in planes
%%   set _ = types.update({plane: buffer(shape)})
%%   set _ = bindings.append((plane, buffer(shape), "", "read"))
%% endfor
%% set _ = bindings.append(("y", y_type, "", "write"))
%% call executable(name, [], bindings, threads, subgroup)
${indices([0, 1, 4, 16, teams, groups, subgroup, subgroups, rows_each, rows, threads])}
      %zero = arith.constant 0.0 : f32
      %zeros = arith.constant dense<0.0> : vector<4xf32>
      %sums = memref.alloc() : ${sums_type}
      %tile = arith.addi %workgroup_x, %c0 : index
      %team = arith.divui %thread, %c16 : index
      %lane = arith.remui %thread, %c16 : index
      %step = arith.divui %lane, %c4 : index
      %quad = arith.remui %lane, %c4 : index

      // Stage 1: which rows of x. Past the end the last one again, which is not stored.
      %first_row = arith.muli %workgroup_y, %c${rows_each} : index
      %last_row = arith.constant ${rows - 1} : index
%% for row in range(rows_each)
      %wanted_row_${row} = affine.apply affine_map<(first) -> (first + ${row})>(%first_row)
      %row_${row} = arith.minui %wanted_row_${row}, %last_row : index
%% endfor

      // Stage 2: a group a team and round.
      %met:${rows_each} = scf.for %group = %team to %c${groups} step %c${teams}
          iter_args(
%%- for row in range(rows_each)
%sum_${row} = %zeros${", " if not loop.last else ""}
%%- endfor
)
          -> (${(["vector<4xf32>"] * rows_each) | join(", ")}) {
${weights(format, types)}
%% for row in range(rows_each)
%%   for half in range(2)
      %half_${row}_${half} = arith.constant ${half} : index
      %x_${row}_${half} = memref.load %x[%row_${row}, %group, %step, %half_${row}_${half}] : ${x_type}
%%     for k in range(4)
%%       set id = "%d_%d" % (row, 4 * half + k)
      %number_${id} = vector.extract %x_${row}_${half}[${k}] : f32 from vector<4xf32>
      %numbers_${id} = vector.broadcast %number_${id} : f32 to vector<4xf32>
      %dot_${id} = math.fma %code_${4 * half + k}, %numbers_${id},
          ${"%%dot_%d_%d" % (row, 4 * half + k - 1) if half or k else ("%%sum_%d" % row if format in plain else "%zeros")} : vector<4xf32>
%%     endfor
%%   endfor
%%   if format in with_minima
      %pairs_${row} = arith.addf %x_${row}_0, %x_${row}_1 : vector<4xf32>
      %all_${row} = vector.reduction <add>, %pairs_${row} : vector<4xf32> into f32
      %alls_${row} = vector.broadcast %all_${row} : f32 to vector<4xf32>
      %below_${row} = arith.mulf %alls_${row}, %minima : vector<4xf32>
      %less_${row} = arith.subf %sum_${row}, %below_${row} : vector<4xf32>
%%   endif
%%   if format not in plain
      %now_${row} = math.fma %dot_${row}_7, %factors, %${"less" if format in with_minima else "sum"}_${row} : vector<4xf32>
%%   endif
%% endfor
        scf.yield
%%- for row in range(rows_each)
 %${"dot_%d_7" % row if format in plain else "now_%d" % row}${"," if not loop.last else ""}
%%- endfor
 : ${(["vector<4xf32>"] * rows_each) | join(", ")}
      }

      // Stage 3: the lanes of a subgroup with the same 4 rows of weights.
%% for row in range(rows_each)
%%   for k in range(4)
      %part_${row}_${k} = vector.extract %met#${row}[${k}] : f32 from vector<4xf32>
${across_lanes("joined_%d_%d" % (row, k), "%%part_%d_%d" % (row, k), "arith.addf", 4, subgroup, subgroup)}
%%   endfor
      %joined_${row} = vector.from_elements %joined_${row}_0, %joined_${row}_1, %joined_${row}_2, %joined_${row}_3
          : vector<4xf32>
%% endfor
      %subgroup_number = arith.divui %thread, %c${subgroup} : index
      %lane_in_subgroup = arith.remui %thread, %c${subgroup} : index
      %is_first = arith.cmpi ult, %lane_in_subgroup, %c4 : index
      scf.if %is_first {
%% for row in range(rows_each)
        %row_number_${row} = arith.constant ${row} : index
        memref.store %joined_${row}, %sums[%subgroup_number, %row_number_${row}, %quad] : ${sums_type}
%% endfor
      }
      gpu.barrier

      // Stage 4: the subgroups; a thread joins 4 columns of a row of y.
      %outputs = arith.constant ${4 * rows_each} : index
      scf.for %output = %thread to %outputs step %c${threads} {
        %own_row = arith.divui %output, %c4 : index
        %own_quad = arith.remui %output, %c4 : index
        %sum = scf.for %member = %c0 to %c${subgroups} step %c1 iter_args(%before = %zeros) -> (vector<4xf32>) {
          %part = memref.load %sums[%member, %own_row, %own_quad] : ${sums_type}
          %after = arith.addf %before, %part : vector<4xf32>
          scf.yield %after : vector<4xf32>
        }
        %y_row = arith.addi %first_row, %own_row : index
        %is_row = arith.cmpi ult, %y_row, %c${rows} : index
        %y_quad = affine.apply affine_map<(tile, quad) -> (tile * 4 + quad)>(%tile, %own_quad)
%% if is_whole
        %quad_count = arith.constant ${out_features // 4} : index
        %is_column = arith.cmpi ult, %y_quad, %quad_count : index
        %is_inside = arith.andi %is_row, %is_column : i1
        scf.if %is_inside {
          memref.store %sum, %y[%y_row, %y_quad] : ${y_type}
        }
%% else
        %column_count = arith.constant ${out_features} : index
%%   for k in range(4)
        %y_column_${k} = affine.apply affine_map<(quad) -> (quad * 4 + ${k})>(%y_quad)
        %is_column_${k} = arith.cmpi ult, %y_column_${k}, %column_count : index
        %is_inside_${k} = arith.andi %is_row, %is_column_${k} : i1
        scf.if %is_inside_${k} {
          %y_${k} = vector.extract %sum[${k}] : f32 from vector<4xf32>
          memref.store %y_${k}, %y[%y_row, %y_column_${k}] : ${y_type}
        }
%%   endfor
%% endif
      }
%% endcall
