// Stores the keys and values of new tokens in their pages, in place: the cache goes in and is the result.
//
// A thread takes 4 elements of a key and the same 4 of a value. Threads are numbered along a tensor of keys,
// [batch, seq, kv_heads, head_dim / 4]. Padding, a token with a negative position, is not stored.
%% from "macros.mlir" import executable, buffer, indices
%% set words = {"f16": "vector<2xi32>", "bf16": "vector<2xi32>", "f32": "vector<4xi32>"}[element]
%% set quads = head_dim // 4
%% set cache_type = buffer("?x%dx2x%dx%dx%dx%s" % (layers, kv_heads, page_size, quads, words))
%% set new_type = buffer("%dx?x%dx%dxvector<4xf32>" % (batch, kv_heads, quads))
%% set table_type = buffer("%dx?xi32" % batch)
%% set positions_type = buffer("%dx?xi32" % batch)
%% call executable(
     name,
     ["pages", "seq", "entries", "layer"],
     [("cache", cache_type, "{%pages}", "write"),
      ("key", new_type, "{%seq}", "read"),
      ("value", new_type, "{%seq}", "read"),
      ("table", table_type, "{%entries}", "read"),
      ("positions", positions_type, "{%seq}", "read")],
     threads, subgroup)
${indices([0, 1, batch, quads, kv_heads, page_size, threads])}
      // Which elements.
      %first = arith.muli %workgroup_x, %c${threads} : index
      %number = arith.addi %first, %thread : index
      %quad = arith.remui %number, %c${quads} : index
      %head_number = arith.divui %number, %c${quads} : index
      %head = arith.remui %head_number, %c${kv_heads} : index
      %token = arith.divui %head_number, %c${kv_heads} : index
      %tokens = arith.muli %seq, %c${batch} : index
      %is_inside = arith.cmpi ult, %token, %tokens : index
      scf.if %is_inside {
        %row = arith.divui %token, %seq : index
        %column = arith.remui %token, %seq : index
        %position_i32 = memref.load %positions[%row, %column] : ${positions_type}
        %zero = arith.constant 0 : i32
        %is_token = arith.cmpi sge, %position_i32, %zero : i32
        scf.if %is_token {
          // Where they go.
          %position = arith.index_castui %position_i32 : i32 to index
          %entry = arith.divui %position, %c${page_size} : index
          %slot = arith.remui %position, %c${page_size} : index
          %page_i32 = memref.load %table[%row, %entry] : ${table_type}
          %page = arith.index_castui %page_i32 : i32 to index
%% for kind in ("key", "value")
          %${kind}_f32 = memref.load %${kind}[%row, %column, %head, %quad] : ${new_type}
%%   if element == "f16"
          %${kind}_f16 = arith.truncf %${kind}_f32 : vector<4xf32> to vector<4xf16>
          %${kind}_words = vector.bitcast %${kind}_f16 : vector<4xf16> to ${words}
%%   elif element == "f32"
          %${kind}_words = vector.bitcast %${kind}_f32 : vector<4xf32> to ${words}
%%   else
          // Rounded to the nearest bfloat16, ties to even, in integers; a NaN stays one.
          %${kind}_bits = vector.bitcast %${kind}_f32 : vector<4xf32> to vector<4xi32>
          %${kind}_sixteen = arith.constant dense<16> : vector<4xi32>
          %${kind}_ones = arith.constant dense<1> : vector<4xi32>
          %${kind}_half = arith.constant dense<0x7FFF> : vector<4xi32>
          %${kind}_nan = arith.constant dense<0x7FC0> : vector<4xi32>
          %${kind}_upper = arith.shrui %${kind}_bits, %${kind}_sixteen : vector<4xi32>
          %${kind}_odd = arith.andi %${kind}_upper, %${kind}_ones : vector<4xi32>
          %${kind}_addend = arith.addi %${kind}_half, %${kind}_odd : vector<4xi32>
          %${kind}_sum = arith.addi %${kind}_bits, %${kind}_addend : vector<4xi32>
          %${kind}_rounded = arith.shrui %${kind}_sum, %${kind}_sixteen : vector<4xi32>
          %${kind}_is_nan = arith.cmpf uno, %${kind}_f32, %${kind}_f32 : vector<4xf32>
          %${kind}_codes = arith.select %${kind}_is_nan, %${kind}_nan, %${kind}_rounded : vector<4xi1>, vector<4xi32>
%%     for word in range(2)
          %${kind}_low${word} = vector.extract %${kind}_codes[${2 * word}] : i32 from vector<4xi32>
          %${kind}_high${word} = vector.extract %${kind}_codes[${2 * word + 1}] : i32 from vector<4xi32>
          %${kind}_shift${word} = arith.constant 16 : i32
          %${kind}_raised${word} = arith.shli %${kind}_high${word}, %${kind}_shift${word} : i32
          %${kind}_word${word} = arith.ori %${kind}_raised${word}, %${kind}_low${word} : i32
%%     endfor
          %${kind}_words = vector.from_elements %${kind}_word0, %${kind}_word1 : ${words}
%%   endif
          memref.store %${kind}_words, %cache[%page, %layer, %c${loop.index0}, %head, %slot, %quad] : ${cache_type}
%% endfor
        }
      }
%% endcall

util.func private @${symbol}(
    %cache: ${cache}, %key: ${key}, %value: ${key}, %page_table: ${table}, %positions: ${positions}, %layer: index
) -> ${cache} {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %pages = tensor.dim %cache, %c0 : ${cache}
  %seq = tensor.dim %key, %c1 : ${key}
  %entries = tensor.dim %page_table, %c1 : ${table}
  %pages_i32 = arith.index_castui %pages : index to i32
  %seq_i32 = arith.index_castui %seq : index to i32
  %entries_i32 = arith.index_castui %entries : index to i32
  %layer_i32 = arith.index_castui %layer : index to i32
  %threads_per_token = arith.constant ${batch * kv_heads * quads} : index
  %threads_per_workgroup = arith.constant ${threads} : index
  %all_threads = arith.muli %seq, %threads_per_token : index
  %workgroups = arith.ceildivui %all_threads, %threads_per_workgroup : index
  %updated = flow.dispatch @${name}::@${name}[%workgroups, %c1, %c1](
      %pages_i32, %seq_i32, %entries_i32, %layer_i32, %cache, %key, %value, %page_table, %positions)
      : (i32, i32, i32, i32, ${sized(cache, "%pages")}, ${sized(key, "%seq")}, ${sized(key, "%seq")},
         ${sized(table, "%entries")}, ${sized(positions, "%seq")})
      -> %cache${sizes(cache, "%pages")}
  util.return %updated : ${cache}
}
