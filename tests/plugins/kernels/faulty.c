// Kernels that do what no kernel may do, if told to.
#include "../../../plugins/kernels/kernel.h"

KERNEL void faulty_fill(int32_t* x, size_t offset, ptrdiff_t from, ptrdiff_t to) {
  for (ptrdiff_t i = from; i < to; ++i) ((volatile int32_t*)x)[(ptrdiff_t)offset + i] = 7;
}

KERNEL void faulty_add(int32_t* x, size_t offset, size_t count) {
  for (size_t i = 1; i < count; ++i) x[offset] += x[offset + i];
}
