// What kernels have in common.
//
// Templates are Jinja's: a line that begins with %% is a statement, a dollar sign and braces an expression.

// An executable of one dispatch, whose workload is its number of workgroups.
//
// name       of the executable and of its dispatch
// constants  names of the i32s that it is passed; the body has each as an index
// bindings   (name, type, "{%size}" of what is dynamic, "write" or "read") of each buffer, in the order of the dispatch
// threads    of a workgroup
// subgroup   how many of them run in step, and can shuffle
%% macro executable(name, constants, bindings, threads, subgroup)
%% set layout
#hal.pipeline.layout<constants = ${constants | length}, bindings = [
%%- for _, _, _, access in bindings
#hal.pipeline.binding<storage_buffer${"" if access == "write" else ", ReadOnly"}>${", " if not loop.last else ""}
%%- endfor
]>
%%- endset
hal.executable.source private @${name} {
  hal.executable.export public @${name} ordinal(0) layout(${layout})
      count(%device: !hal.device, %x: index, %y: index, %z: index) -> (index, index, index) {
    hal.return %x, %y, %z : index, index, index
  }
  builtin.module {
    func.func @${name}() attributes {translation_info = #iree_codegen.translation_info<
        pipeline = #iree_codegen.no_pipeline workgroup_size = [${threads}, 1, 1] subgroup_size = ${subgroup}>} {
      %zero_offset = arith.constant 0 : index
%% for constant in constants
      %${constant}_i32 = hal.interface.constant.load layout(${layout}) ordinal(${loop.index0}) : i32
      %${constant} = arith.index_castui %${constant}_i32 : i32 to index
%% endfor
%% for binding, type, sizes, access in bindings
      %${binding} = hal.interface.binding.subspan layout(${layout}) binding(${loop.index0}) alignment(64)
          offset(%zero_offset) ${"" if access == "write" else "flags(ReadOnly) "}: ${type}${sizes}
%% endfor
      %thread = gpu.thread_id x
      %workgroup_x = hal.interface.workgroup.id[0] : index
      %workgroup_y = hal.interface.workgroup.id[1] : index
      %workgroup_z = hal.interface.workgroup.id[2] : index
${caller()}
      return
    }
  }
}
%% endmacro

// A buffer's type.
%% macro buffer(shape)
memref<${shape}, #hal.descriptor_type<storage_buffer>>
%%- endmacro

// The type of memory that a workgroup shares.
%% macro shared(shape)
memref<${shape}, #gpu.address_space<workgroup>>
%%- endmacro

// Constants of type index, one for every number.
%% macro indices(numbers)
%% for number in numbers | unique
      %c${number} = arith.constant ${number} : index
%% endfor
%% endmacro

// %name = the result of an operation over the lanes of a subgroup whose numbers differ in the bits from..to.
// Every lane has it. All lanes of the subgroup must come here together.
%% macro across_lanes(name, value, operation, first, last, subgroup)
%% set steps = []
%% for bit in range(12)
%%   if first <= 2 ** bit < last
%%     set _ = steps.append(2 ** bit)
%%   endif
%% endfor
%% if not steps
      %${name} = arith.bitcast ${value} : f32 to f32
%% endif
%% for step in steps
%%   set before = value if loop.first else "%" ~ name ~ "_" ~ loop.index0
%%   set after = name if loop.last else name ~ "_" ~ loop.index
      %${name}_offset${step} = arith.constant ${step} : i32
      %${name}_width${step} = arith.constant ${subgroup} : i32
      %${name}_other${step}, %${name}_valid${step} = gpu.shuffle xor ${before}, %${name}_offset${step},
          %${name}_width${step} : f32
      %${after} = ${operation} ${before}, %${name}_other${step} : f32
%% endfor
%% endmacro

// %name_0, %name_1, .. of vector<4xf32>: the numbers that 16 bytes of a cache hold.
%% macro unpack_floats(name, words, element)
%% if element == "f32"
      %${name}_0 = vector.bitcast ${words} : vector<4xi32> to vector<4xf32>
%% elif element == "f16"
%%   for half in range(2)
      %${name}_words${half} = vector.shuffle ${words}, ${words} [${2 * half}, ${2 * half + 1}]
          : vector<4xi32>, vector<4xi32>
      %${name}_halves${half} = vector.bitcast %${name}_words${half} : vector<2xi32> to vector<4xf16>
      %${name}_${half} = arith.extf %${name}_halves${half} : vector<4xf16> to vector<4xf32>
%%   endfor
%% else
      // A bfloat16 is the upper half of a float32; some targets have no other bfloat16.
      %${name}_sixteen = arith.constant dense<16> : vector<4xi32>
      %${name}_upper = arith.constant dense<0xFFFF0000> : vector<4xi32>
      %${name}_even_words = arith.shli ${words}, %${name}_sixteen : vector<4xi32>
      %${name}_odd_words = arith.andi ${words}, %${name}_upper : vector<4xi32>
      %${name}_even = vector.bitcast %${name}_even_words : vector<4xi32> to vector<4xf32>
      %${name}_odd = vector.bitcast %${name}_odd_words : vector<4xi32> to vector<4xf32>
      %${name}_0 = vector.shuffle %${name}_even, %${name}_odd [0, 4, 1, 5] : vector<4xf32>, vector<4xf32>
      %${name}_1 = vector.shuffle %${name}_even, %${name}_odd [2, 6, 3, 7] : vector<4xf32>, vector<4xf32>
%% endif
%% endmacro
