// Calls kernels in a process of its own, which may have sanitizers, be for another processor under an emulator, and end
// when a kernel does what it should not. It serves requests from stdin until that ends.
//
// A request is: 8-byte numbers unless told otherwise, all in this machine's byte order
//   length of the kernel's name, the name
//   number of buffers, for each its length in bytes and its bytes
//   number of floats that every call gets, each 4 bytes
//   number of calls, number of integers that each gets, for each call its integers
// The answer is the bytes of all buffers after the calls. A kernel is passed a pointer and the offset 0 for every
// buffer, and then the integers; see call() for the floats.
#include <stddef.h>
#include <stdint.h>

#if __STDC_HOSTED__
#include <sys/mman.h>
#include <unistd.h>
#else
#include "linux.h"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)0)
#endif

enum { MAX_NAME = 128, MAX_BUFFERS = 16, MAX_INTEGERS = 40, MAX_FLOATS = 4 };

typedef void kernel(size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t,
                    size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t,
                    size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t,
                    size_t, size_t, size_t, size_t, float, float, float, float);

// KERNELS lists the kernels that are linked: KERNEL(a) KERNEL(b) ...
#define KERNEL(name) void name(void);
KERNELS
#undef KERNEL
#define KERNEL(name) {#name, name},
static const struct {
  const char* name;
  void (*function)(void);
} kernels[] = {KERNELS};

static size_t length(const char* text) {
  size_t size = 0;
  while (text[size]) ++size;
  return size;
}

static int is_equal(const char* a, const char* b) {
  for (; *a && *a == *b; ++a) ++b;
  return *a == *b;
}

static void fail(const char* reason) {
  const char* parts[] = {"driver: ", reason, "\n"};
  for (int i = 0; i < 3; ++i)
    if (write(2, parts[i], length(parts[i])) < 0) _exit(3);
  _exit(2);
}

// Whether all could be read; false if stdin ends before the first byte.
static int receive_or_end(void* out, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t got = read(0, (char*)out + done, size - done);
    if (got == 0 && done == 0) return 0;
    if (got <= 0) fail("a request ends early");
    done += (size_t)got;
  }
  return 1;
}

static void receive(void* out, size_t size) {
  if (!receive_or_end(out, size)) fail("a request ends early");
}

static size_t receive_size(size_t most) {
  uint64_t value;
  receive(&value, sizeof value);
  if (value > most) fail("a request holds a number that is too large");
  return value;
}

static void answer(const void* data, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t put = write(1, (const char*)data + done, size - done);
    if (put <= 0) fail("an answer cannot be written");
    done += (size_t)put;
  }
}

enum { PAGE = 1 << 16 };  // a multiple of what any system has

// A buffer that ends where a page begins that may not be touched; there is another one in front.
typedef struct {
  unsigned char *memory, *data;
  size_t memory_size, size;
} buffer;

static buffer receive_buffer(void) {
  size_t size = receive_size(SIZE_MAX), whole = (size + PAGE - 1) / PAGE * PAGE;
  buffer b = {.memory_size = whole + 2 * PAGE, .size = size};
  b.memory = mmap(NULL, b.memory_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (b.memory == MAP_FAILED || (whole && mprotect(b.memory + PAGE, whole, PROT_READ | PROT_WRITE)))
    fail("no memory for a buffer");
  b.data = b.memory + PAGE + whole - size;
  receive(b.data, size);
  ASAN_POISON_MEMORY_REGION(b.memory + PAGE, (whole - size) / 8 * 8);
  return b;
}

// Both calling conventions, System V on x86-64 and AAPCS64, hand out the registers for integers and pointers, the
// registers for floats, and 8 bytes of stack for each integer that finds no register, all independently of each other
// and in order; the caller cleans up. So every kernel can be called with its integers first, its floats behind them,
// and more of both than it takes.
static void call(void (*function)(void), const size_t* i, const float* f) {
  ((kernel*)function)(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13], i[14],
                      i[15], i[16], i[17], i[18], i[19], i[20], i[21], i[22], i[23], i[24], i[25], i[26], i[27], i[28],
                      i[29], i[30], i[31], i[32], i[33], i[34], i[35], i[36], i[37], i[38], i[39], f[0], f[1], f[2],
                      f[3]);
}

static void serve(size_t name_size) {
  static char name[MAX_NAME + 1];
  receive(name, name_size);
  name[name_size] = 0;
  void (*function)(void) = NULL;
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; ++i)
    if (is_equal(kernels[i].name, name)) function = kernels[i].function;
  if (!function) fail("no such kernel");

  static buffer buffers[MAX_BUFFERS];
  static size_t integers[MAX_INTEGERS];
  static float floats[MAX_FLOATS];
  size_t count = receive_size(MAX_BUFFERS);
  for (size_t i = 0; i < count; ++i) {
    buffers[i] = receive_buffer();
    integers[2 * i] = (size_t)buffers[i].data;
    integers[2 * i + 1] = 0;
  }
  receive(floats, receive_size(MAX_FLOATS) * sizeof *floats);
  size_t calls = receive_size(SIZE_MAX), per_call = receive_size(MAX_INTEGERS - 2 * count);
  for (; calls > 0; --calls) {
    receive(integers + 2 * count, per_call * sizeof *integers);
    call(function, integers, floats);
  }

  for (size_t i = 0; i < count; ++i) {
    answer(buffers[i].data, buffers[i].size);
    ASAN_UNPOISON_MEMORY_REGION(buffers[i].memory, buffers[i].memory_size);
    munmap(buffers[i].memory, buffers[i].memory_size);
  }
}

int main(void) {
  // Denormal floats are flushed to zero, as IREE's threads have it.
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#else
  __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)1 << 24));
#endif
  uint64_t name_size;
  while (receive_or_end(&name_size, sizeof name_size)) {
    if (name_size > MAX_NAME) fail("a kernel's name is too long");
    serve(name_size);
  }
  return 0;
}
