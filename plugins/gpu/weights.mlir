// How a lane reads weights that lie in tiles of 16 rows: 4 rows of 8 columns at a time, as the archive's planes hold
// them (llmir_iree.params.layouts says how).
//
// A lane has %tile, %group (32 columns), %step (8 columns of the group) and %quad (4 rows of the tile); step and quad
// number 16 lanes, which together read the codes of a tile's group as one run of bytes. Values are vectors of the 4
// rows:
//   %code_0 .. %code_7   the columns' codes as floats; of plain formats the weights themselves
//   %factors, %minima    weight = code * factor - minimum, for all columns of the lane

%% macro weights(format, types)
%% if format in ("f16", "bf16")
%%   for k in range(8)
      %column_${k} = affine.apply affine_map<(group, step) -> (group * 32 + step * 8 + ${k})>(%group, %step)
      %raw_${k} = memref.load %w[%tile, %column_${k}, %quad] : ${types.w}
${floats("code_%d" % k, "%%raw_%d" % k, format)}
%%   endfor
%% else
%%   if format == "q8_0"
%%     for half in range(2)
      %word_${half} = affine.apply affine_map<(step) -> (step * 2 + ${half})>(%step)
      %words_${half} = memref.load %qs[%tile, %group, %word_${half}, %quad] : ${types.qs}
      %high_byte_${half} = arith.constant dense<24> : vector<4xi32>
%%       for k in range(4)
%%         set id = 4 * half + k
      %up_${id} = arith.constant dense<${24 - 8 * k}> : vector<4xi32>
      %raised_${id} = arith.shli %words_${half}, %up_${id} : vector<4xi32>
      %signed_${id} = arith.shrsi %raised_${id}, %high_byte_${half} : vector<4xi32>
      %code_${id} = arith.sitofp %signed_${id} : vector<4xi32> to vector<4xf32>
%%       endfor
%%     endfor
%%   else
%%     set low = "ql" if format == "q6_k" else "qs"
      %words = memref.load %${low}[%tile, %group, %step, %quad] : ${types[low]}
      %nibble = arith.constant dense<15> : vector<4xi32>
%%     if format == "q5_k"
      // The fifth bits of this step's columns are at bits 2 * step and 2 * step + 1 of each byte.
      %no_index = arith.constant 0 : index
      %high_words = memref.load %qh[%tile, %group, %no_index, %quad] : ${types.qh}
      %bit_index = affine.apply affine_map<(step) -> (step * 2)>(%step)
      %bit_mask = arith.constant dense<1> : vector<4xi32>
%%     elif format == "q6_k"
      // The high two bits are at bits 4 * (step mod 2) and 2 above that, of byte row step / 2.
      %two_index = arith.constant 2 : index
      %four_index = arith.constant 4 : index
      %high_row = arith.divui %step, %two_index : index
      %high_words = memref.load %qh[%tile, %group, %high_row, %quad] : ${types.qh}
      %high_odd = arith.remui %step, %two_index : index
      %bit_index = arith.muli %high_odd, %four_index : index
      %bit_mask = arith.constant dense<3> : vector<4xi32>
%%     endif
%%     if format in ("q5_k", "q6_k")
      %bit_i32 = arith.index_castui %bit_index : index to i32
      %bit = vector.broadcast %bit_i32 : i32 to vector<4xi32>
      %high_bits = arith.shrui %high_words, %bit : vector<4xi32>
      %four_bits = arith.constant dense<4> : vector<4xi32>
%%     endif
%%     for half in range(2)
%%       for k in range(4)
%%         set id = 4 * half + k
      %down_${id} = arith.constant dense<${8 * k + 4 * half}> : vector<4xi32>
      %lowered_${id} = arith.shrui %words, %down_${id} : vector<4xi32>
      %low_${id} = arith.andi %lowered_${id}, %nibble : vector<4xi32>
%%         if format in ("q5_k", "q6_k")
      %high_down_${id} = arith.constant dense<${8 * k + half * (1 if format == "q5_k" else 2)}> : vector<4xi32>
      %high_lowered_${id} = arith.shrui %high_bits, %high_down_${id} : vector<4xi32>
      %high_${id} = arith.andi %high_lowered_${id}, %bit_mask : vector<4xi32>
      %high_raised_${id} = arith.shli %high_${id}, %four_bits : vector<4xi32>
      %whole_${id} = arith.ori %low_${id}, %high_raised_${id} : vector<4xi32>
      %code_${id} = arith.uitofp %whole_${id} : vector<4xi32> to vector<4xf32>
%%         else
      %code_${id} = arith.uitofp %low_${id} : vector<4xi32> to vector<4xf32>
%%         endif
%%       endfor
%%     endfor
%%   endif
${scales(format, types)}
%% endif
%% endmacro

// Whether a format's weights have a minimum, and whether they have a factor.
%% set with_minima = ("q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
%% set plain = ("f16", "bf16")

%% macro scales(format, types)
%% if format in ("q4_0", "q4_1", "q8_0")
      %d_words = memref.load %d[%tile, %group, %quad] : ${types.d}
${floats("factors", "%d_words", "f16")}
%%   if format == "q4_0"
      %eight = arith.constant dense<8.0> : vector<4xf32>
      %minima = arith.mulf %factors, %eight : vector<4xf32>
%%   elif format == "q4_1"
      %m_words = memref.load %m[%tile, %group, %quad] : ${types.m}
${floats("positive_minima", "%m_words", "f16")}
      %minima = arith.negf %positive_minima : vector<4xf32>
%%   endif
%% else
      %groups_in_block = arith.constant 8 : index
      %block = arith.divui %group, %groups_in_block : index
      %d_words = memref.load %d[%tile, %block, %quad] : ${types.d}
${floats("block_factors", "%d_words", "f16")}
%%   if format == "q6_k"
      // One signed byte for every 16 columns and row.
      %half_group = arith.divui %step, %two_index : index
      %group_halves = arith.muli %group, %two_index : index
      %sixteen = arith.addi %group_halves, %half_group : index
      %scale_bytes = memref.load %scales[%tile, %sixteen, %quad] : ${types.scales}
      %scale_words = vector.broadcast %scale_bytes : i32 to vector<4xi32>
      %scale_ups = arith.constant dense<[24, 16, 8, 0]> : vector<4xi32>
      %scale_down = arith.constant dense<24> : vector<4xi32>
      %scale_raised = arith.shli %scale_words, %scale_ups : vector<4xi32>
      %scale_signed = arith.shrsi %scale_raised, %scale_down : vector<4xi32>
      %scale_floats = arith.sitofp %scale_signed : vector<4xi32> to vector<4xf32>
      %factors = arith.mulf %block_factors, %scale_floats : vector<4xf32>
      %offset = arith.constant dense<32.0> : vector<4xf32>
      %minima = arith.mulf %factors, %offset : vector<4xf32>
%%   else
      // Eight scales and minima of 6 bits in 12 bytes. Of these, the first four hold scales 0..3 in their low 6 bits,
      // the next four the minima 0..3; the last four the low nibbles of scales and minima 4..7, whose high 2 bits are
      // the top bits of the first eight. A word has that byte of 4 rows, and all are decoded at once.
      %number_in_block = arith.remui %group, %groups_in_block : index
      %four_scales = arith.constant 4 : index
      %third_run = arith.constant 8 : index
      %first_at = arith.remui %number_in_block, %four_scales : index
      %second_at = arith.addi %first_at, %four_scales : index
      %third_at = arith.addi %first_at, %third_run : index
      %first_word = memref.load %scales[%tile, %block, %first_at, %quad] : ${types.scales}
      %second_word = memref.load %scales[%tile, %block, %second_at, %quad] : ${types.scales}
      %third_word = memref.load %scales[%tile, %block, %third_at, %quad] : ${types.scales}
      %is_early = arith.cmpi ult, %number_in_block, %four_scales : index
      %mask_6 = arith.constant 0x3F3F3F3F : i32
      %mask_4 = arith.constant 0x0F0F0F0F : i32
      %mask_top = arith.constant 0x30303030 : i32
      %shift_2 = arith.constant 2 : i32
      %shift_4 = arith.constant 4 : i32
      %third_high = arith.shrui %third_word, %shift_4 : i32
%%     for kind, run, low in (("scale", "first", "third_word"), ("minimum", "second", "third_high"))
      %early_${kind} = arith.andi %${run}_word, %mask_6 : i32
      %late_${kind}_low = arith.andi %${low}, %mask_4 : i32
      %late_${kind}_raised = arith.shrui %${run}_word, %shift_2 : i32
      %late_${kind}_high = arith.andi %late_${kind}_raised, %mask_top : i32
      %late_${kind} = arith.ori %late_${kind}_low, %late_${kind}_high : i32
      %${kind}_bytes = arith.select %is_early, %early_${kind}, %late_${kind} : i32
      %${kind}_words = vector.broadcast %${kind}_bytes : i32 to vector<4xi32>
      %${kind}_downs = arith.constant dense<[0, 8, 16, 24]> : vector<4xi32>
      %${kind}_mask = arith.constant dense<63> : vector<4xi32>
      %${kind}_lowered = arith.shrui %${kind}_words, %${kind}_downs : vector<4xi32>
      %${kind}_codes = arith.andi %${kind}_lowered, %${kind}_mask : vector<4xi32>
      %${kind}_floats = arith.uitofp %${kind}_codes : vector<4xi32> to vector<4xf32>
%%     endfor
      %factors = arith.mulf %block_factors, %scale_floats : vector<4xf32>
      %dmin_words = memref.load %dmin[%tile, %block, %quad] : ${types.dmin}
${floats("block_minima", "%dmin_words", "f16")}
      %minima = arith.mulf %block_minima, %minimum_floats : vector<4xf32>
%%   endif
%% endif
%% endmacro

// %name = 4 numbers of 16 bits as float32.
%% macro floats(name, words, element)
%% if element == "f16"
      %${name}_f16 = vector.bitcast ${words} : vector<2xi32> to vector<4xf16>
      %${name} = arith.extf %${name}_f16 : vector<4xf16> to vector<4xf32>
%% else
      // A bfloat16 is the upper half of a float32; some targets have no other bfloat16.
      %${name}_sixteen = arith.constant dense<16> : vector<2xi32>
      %${name}_upper = arith.constant dense<0xFFFF0000> : vector<2xi32>
      %${name}_even_words = arith.shli ${words}, %${name}_sixteen : vector<2xi32>
      %${name}_odd_words = arith.andi ${words}, %${name}_upper : vector<2xi32>
      %${name}_even = vector.bitcast %${name}_even_words : vector<2xi32> to vector<2xf32>
      %${name}_odd = vector.bitcast %${name}_odd_words : vector<2xi32> to vector<2xf32>
      %${name} = vector.shuffle %${name}_even, %${name}_odd [0, 2, 1, 3] : vector<2xf32>, vector<2xf32>
%% endif
%% endmacro
