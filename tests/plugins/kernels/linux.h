// What driver.c needs of a C library, on Linux without one: for another processor, building one would take a minute.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef ptrdiff_t ssize_t;

enum { PROT_NONE = 0, PROT_READ = 1, PROT_WRITE = 2, MAP_PRIVATE = 2, MAP_ANONYMOUS = 32 };
#define MAP_FAILED ((void*)-1)

// The program starts with an aligned stack, but not as a function would be called.
#if defined(__x86_64__)

enum { READ = 0, WRITE = 1, MMAP = 9, MPROTECT = 10, MUNMAP = 11, EXIT_GROUP = 231 };

static inline long system_call(long number, long a, long b, long c, long d, long e, long f) {
  register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "+a"(number)
                   : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return number;
}

__asm__(".globl _start\n_start:\n  call start\n");

#elif defined(__aarch64__)

enum { READ = 63, WRITE = 64, EXIT_GROUP = 94, MUNMAP = 215, MMAP = 222, MPROTECT = 226 };

static inline long system_call(long number, long a, long b, long c, long d, long e, long f) {
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
  __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}

__asm__(".globl _start\n_start:\n  bl start\n");

#endif

static inline ssize_t read(int file, void* out, size_t size) {
  return system_call(READ, file, (long)out, (long)size, 0, 0, 0);
}

static inline ssize_t write(int file, const void* data, size_t size) {
  return system_call(WRITE, file, (long)data, (long)size, 0, 0, 0);
}

_Noreturn static inline void _exit(int status) {
  for (;;) system_call(EXIT_GROUP, status, 0, 0, 0, 0, 0);
}

static inline void* mmap(void* at, size_t size, int access, int flags, int file, long offset) {
  long result = system_call(MMAP, (long)at, (long)size, access, flags, file, offset);
  return result < 0 && result > -4096 ? MAP_FAILED : (void*)result;
}

static inline int munmap(void* memory, size_t size) {
  return (int)system_call(MUNMAP, (long)memory, (long)size, 0, 0, 0, 0);
}

static inline int mprotect(void* memory, size_t size, int access) {
  return (int)system_call(MPROTECT, (long)memory, (long)size, access, 0, 0, 0);
}

int main(void);
__attribute__((used)) static void start(void) { _exit(main()); }
