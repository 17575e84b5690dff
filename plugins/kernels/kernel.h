// What every kernel file starts with: how a kernel is exported, how it gets its operands, and the types they have.
//
// A kernel is called from the body of an IREE dispatch with bare pointers, so each buffer is two arguments, a pointer
// and an offset in elements, followed by sizes and by the workgroup's share of the work. It has no libc, no static data
// that needs relocation, and small frames. Compile with -ffreestanding.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define KERNEL __attribute__((visibility("hidden")))
#define INLINE static inline __attribute__((always_inline))

// Loops over registers must vanish: an index into registers that is not a constant puts them on the stack. Not so with
// sanitizers, whose checks would be unrolled, too, and take minutes to compile.
#if defined(__SANITIZE_ADDRESS__)
#define UNROLL
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

// The bits of an IEEE half; arithmetic on it goes through f32.
typedef uint16_t f16;
typedef uint16_t bf16;

INLINE size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// The first of `units` that a workgroup takes; the next workgroup's first is its end. Shares shrink from the first to
// the last: workers claim them in this order, so that small ones are left to fill what big ones left uneven.
INLINE size_t first_unit(size_t units, size_t workgroup, size_t workgroups) {
  if (units <= workgroups) return min_size(units, workgroup);
  size_t later = workgroups - workgroup;
  return units - units * later * later / (workgroups * workgroups);
}
