// Joins the splits of decode_attention: each holds its largest score, and the sum of weights and the weighted values
// relative to that.
//
// A thread takes 4 columns of one head of one row, over all splits.
%% from "macros.mlir" import executable, buffer, indices
%% set columns = head_dim // 4
%% set partials_type = buffer("%dx%dx?x%dxvector<4xf32>" % (batch, heads, columns + 1))
%% set output_type = buffer("%dx%dx%dxvector<4xf32>" % (batch, heads, columns))
%% call executable(
     merge,
     ["splits"],
     [("partials", partials_type, "{%splits}", "read"), ("output", output_type, "", "write")],
     subgroup * 4, subgroup)
${indices([0, 1, columns, heads, batch])}
      %zero = arith.constant 0.0 : f32
      %zeros = arith.constant dense<0.0> : vector<4xf32>
      %lowest = arith.constant -1.0e+30 : f32
      %threads = arith.constant ${subgroup * 4} : index
      %first = arith.muli %workgroup_x, %threads : index
      %number = arith.addi %first, %thread : index
      %column = arith.remui %number, %c${columns} : index
      %head_number = arith.divui %number, %c${columns} : index
      %head = arith.remui %head_number, %c${heads} : index
      %row = arith.divui %head_number, %c${heads} : index
      %is_inside = arith.cmpi ult, %row, %c${batch} : index
      scf.if %is_inside {
        %met:3 = scf.for %split = %c0 to %splits step %c1
            iter_args(%largest = %lowest, %total = %zero, %sum = %zeros) -> (f32, f32, vector<4xf32>) {
          %tail = memref.load %partials[%row, %head, %split, %c${columns}] : ${partials_type}
          %part = memref.load %partials[%row, %head, %split, %column] : ${partials_type}
          %part_largest = vector.extract %tail[0] : f32 from vector<4xf32>
          %part_total = vector.extract %tail[1] : f32 from vector<4xf32>
          %now_largest = arith.maximumf %largest, %part_largest : f32
          %decrease = arith.subf %largest, %now_largest : f32
          %decay = math.exp %decrease : f32
          %below = arith.subf %part_largest, %now_largest : f32
          %factor = math.exp %below : f32
          %kept_total = arith.mulf %total, %decay : f32
          %now_total = math.fma %part_total, %factor, %kept_total : f32
          %decays = vector.broadcast %decay : f32 to vector<4xf32>
          %factors = vector.broadcast %factor : f32 to vector<4xf32>
          %kept = arith.mulf %sum, %decays : vector<4xf32>
          %now_sum = math.fma %part, %factors, %kept : vector<4xf32>
          scf.yield %now_largest, %now_total, %now_sum : f32, f32, vector<4xf32>
        }
        // A row that is idle has met nothing, and gets zeros.
        %is_empty = arith.cmpf oeq, %met#1, %zero : f32
        %unit = arith.constant 1.0 : f32
        %divisor = arith.select %is_empty, %unit, %met#1 : f32
        %divisors = vector.broadcast %divisor : f32 to vector<4xf32>
        %result = arith.divf %met#2, %divisors : vector<4xf32>
        memref.store %result, %output[%row, %head, %column] : ${output_type}
      }
%% endcall
