// y = x * w^T for many rows, by weights in tiles of 16 rows, which are unpacked once for every `rows_each` rows of x.
//
// A workgroup of 128 threads takes `rows_each` rows of x and 8 tiles, so 128 columns of y, and walks over groups of 32
// columns of x. For each, every thread copies a part of x to shared memory, and unpacks 4 rows of 8 columns of weights
// there; then it multiplies 8 rows of x with the weights of its own 4 columns of y.
%% from "macros.mlir" import executable, buffer, shared, indices
%% from "weights.mlir" import weights, with_minima, plain
%% set threads = 128
%% set own_rows = 8
%% set rows_each = threads // 32 * own_rows
%% set x_type = buffer("?x%dx8xvector<4xf32>" % groups)
%% set is_whole = out_features % 4 == 0
%% set y_type = buffer("?x%dxvector<4xf32>" % (out_features // 4) if is_whole else "?x%dxf32" % out_features)
%% set w_tile_type = shared("32x32xvector<4xf32>")
%% set x_tile_type = shared("%dx8xvector<4xf32>" % rows_each)
%% set bindings = [("x", x_type, "{%rows}", "read")]
%% set types = {}
%% for plane, shape in planes
%%   set _ = types.update({plane: buffer(shape)})
%%   set _ = bindings.append((plane, buffer(shape), "", "read"))
%% endfor
%% set _ = bindings.append(("y", y_type, "{%rows}", "write"))
%% set state = (["vector<4xf32>"] * own_rows) | join(", ")
%% call executable(name, ["rows"], bindings, threads, subgroup)
${indices([0, 1, 4, 8, 16, 32, groups, threads, rows_each])}
      %zeros = arith.constant dense<0.0> : vector<4xf32>
      %w_tile = memref.alloc() : ${w_tile_type}
      %x_tile = memref.alloc() : ${x_tile_type}

      // Stage 1: which weights this thread unpacks, and what it multiplies. Past the end it takes the last again.
      %tile_in_workgroup = arith.divui %thread, %c16 : index
      %wanted_tile = affine.apply affine_map<(x, tile) -> (x * 8 + tile)>(%workgroup_x, %tile_in_workgroup)
      %last_tile = arith.constant ${tiles - 1} : index
      %tile = arith.minui %wanted_tile, %last_tile : index
      %lane = arith.remui %thread, %c16 : index
      %step = arith.divui %lane, %c4 : index
      %quad = arith.remui %lane, %c4 : index
      %unpacked_quad = affine.apply affine_map<(tile, quad) -> (tile * 4 + quad)>(%tile_in_workgroup, %quad)
      %own_quad = arith.remui %thread, %c32 : index
      %own_block = arith.divui %thread, %c32 : index
      %first_row = arith.muli %workgroup_y, %c${rows_each} : index
      %last_row = arith.subi %rows, %c1 : index

      // Stage 2: a group of 32 columns of x at a time.
      %met:${own_rows} = scf.for %group = %c0 to %c${groups} step %c1
          iter_args(
%%- for row in range(own_rows)
%sum_${row} = %zeros${", " if not loop.last else ""}
%%- endfor
)
          -> (${state}) {
        %x_words = arith.constant ${8 * rows_each} : index
        scf.for %number = %thread to %x_words step %c${threads} {
          %row_in_workgroup = arith.divui %number, %c8 : index
          %word = arith.remui %number, %c8 : index
          %wanted_row = arith.addi %first_row, %row_in_workgroup : index
          %row = arith.minui %wanted_row, %last_row : index
          %numbers = memref.load %x[%row, %group, %word] : ${x_type}
          memref.store %numbers, %x_tile[%row_in_workgroup, %word] : ${x_tile_type}
        }
${weights(format, types)}
%% if format in with_minima
        %negative_minima = arith.negf %minima : vector<4xf32>
%% endif
%% for k in range(8)
        %unpacked_column_${k} = affine.apply affine_map<(step) -> (step * 8 + ${k})>(%step)
%%   if format in with_minima
        %weight_${k} = math.fma %code_${k}, %factors, %negative_minima : vector<4xf32>
%%   elif format not in plain
        %weight_${k} = arith.mulf %code_${k}, %factors : vector<4xf32>
%%   endif
        memref.store ${"%code_" if format in plain else "%weight_"}${k},
            %w_tile[%unpacked_column_${k}, %unpacked_quad] : ${w_tile_type}
%% endfor
        gpu.barrier
        %group_met:${own_rows} = scf.for %x_word = %c0 to %c8 step %c1
            iter_args(
%%- for row in range(own_rows)
%before_${row}_0 = %sum_${row}${", " if not loop.last else ""}
%%- endfor
)
            -> (${state}) {
%% for k in range(4)
          %column_in_group_${k} = affine.apply affine_map<(word) -> (word * 4 + ${k})>(%x_word)
          %w_${k} = memref.load %w_tile[%column_in_group_${k}, %own_quad] : ${w_tile_type}
%% endfor
%% for row in range(own_rows)
          %own_row_${row} = affine.apply affine_map<(block) -> (block * ${own_rows} + ${row})>(%own_block)
          %x_${row} = memref.load %x_tile[%own_row_${row}, %x_word] : ${x_tile_type}
%%   for k in range(4)
          %x_${row}_${k} = vector.extract %x_${row}[${k}] : f32 from vector<4xf32>
          %xs_${row}_${k} = vector.broadcast %x_${row}_${k} : f32 to vector<4xf32>
          %before_${row}_${k + 1} = math.fma %xs_${row}_${k}, %w_${k}, %before_${row}_${k} : vector<4xf32>
%%   endfor
%% endfor
          scf.yield
%%- for row in range(own_rows)
 %before_${row}_4${"," if not loop.last else ""}
%%- endfor
 : ${state}
        }
        gpu.barrier
        scf.yield
%%- for row in range(own_rows)
 %group_met#${row}${"," if not loop.last else ""}
%%- endfor
 : ${state}
      }

      // Stage 3: the thread's 8 rows of 4 columns of y.
      %y_quad = affine.apply affine_map<(x, quad) -> (x * 32 + quad)>(%workgroup_x, %own_quad)
%% for row in range(own_rows)
      %y_row_${row} = affine.apply affine_map<(first, block) -> (first + block * ${own_rows} + ${row})>(%first_row, %own_block)
      %is_row_${row} = arith.cmpi ult, %y_row_${row}, %rows : index
%%   if is_whole
      %quad_count_${row} = arith.constant ${out_features // 4} : index
      %is_column_${row} = arith.cmpi ult, %y_quad, %quad_count_${row} : index
      %is_inside_${row} = arith.andi %is_row_${row}, %is_column_${row} : i1
      scf.if %is_inside_${row} {
        memref.store %met#${row}, %y[%y_row_${row}, %y_quad] : ${y_type}
      }
%%   else
%%     for k in range(4)
%%       set id = "%d_%d" % (row, k)
      %y_column_${id} = affine.apply affine_map<(quad) -> (quad * 4 + ${k})>(%y_quad)
      %column_count_${id} = arith.constant ${out_features} : index
      %is_column_${id} = arith.cmpi ult, %y_column_${id}, %column_count_${id} : index
      %is_inside_${id} = arith.andi %is_row_${row}, %is_column_${id} : i1
      scf.if %is_inside_${id} {
        %y_${id} = vector.extract %met#${row}[${k}] : f32 from vector<4xf32>
        memref.store %y_${id}, %y[%y_row_${row}, %y_column_${id}] : ${y_type}
      }
%%     endfor
%%   endif
%% endfor
%% endcall
