// What kernels/machine.cuh asks for, on a processor: the threads of a block are fibers of one thread of the host.
//
// A fiber runs until it waits for others, at __syncthreads or where its warp exchanges values, so every barrier that a kernel needs must
// stand in its text: without it a fiber reads what the others have not written, and shared memory starts as NaNs. Start at `run_block`.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define KERNEL extern "C" void
#define DEVICE static inline
#define __shared__ static
#define __restrict__
#define DYNAMIC_SHARED(name) unsigned char* name = soft::dynamic_shared
#define __syncthreads() soft::wait_for_block()
#define threadIdx (soft::self->thread)
#define blockIdx (soft::block_index)
#define blockDim (soft::block_size)
#define gridDim (soft::grid_size)

struct bf16 {
  uint16_t bits;
};
DEVICE float to_float(bf16 x) {
  const uint32_t word = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &word, 4);
  return y;
}
DEVICE bf16 to_bf16(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  if (x != x) return {0x7fff};
  return {(uint16_t)((word + 0x7fffu + (word >> 16 & 1u)) >> 16)};
}
DEVICE float half_to_float(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits >> 15) << 31, exponent = bits >> 10 & 31u, part = bits & 1023u;
  const float size = exponent == 0    ? ldexpf((float)part, -24)
                     : exponent == 31 ? (part ? NAN : INFINITY)
                                      : ldexpf((float)(part | 1024u), (int)exponent - 25);
  return sign ? -size : size;
}
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

namespace soft {
struct Dim {
  unsigned x, y, z;
};
struct Fiber {
  void* stack_pointer;
  Dim thread;
  unsigned lane, warp;
  bool ended;
};
struct Warp {
  unsigned arrived, generation;
  unsigned char values[2][32][64];
};

static Fiber* self;
static void* scheduler;
static Dim block_index, block_size, grid_size;
static unsigned char* dynamic_shared;
static unsigned block_arrived, block_generation, alive;
static std::vector<Warp> warps;
static void (*entry)(void**);
static void** entry_arguments;

#if !defined(__x86_64__)
#error "the software machine switches fibers on x86-64 only"
#endif
// Saves the callee's registers and changes stacks.
extern "C" void soft_switch(void** from, void* to);
__asm__(R"(
.text
.globl soft_switch
.type soft_switch, @function
soft_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size soft_switch, .-soft_switch
)");

static bool moved;  // something happened in this round of the scheduler

static void yield() { soft_switch(&self->stack_pointer, scheduler); }

static void wait_for_block() {
  const unsigned generation = block_generation;
  moved = true;
  if (++block_arrived == alive) {
    block_arrived = 0;
    block_generation++;
    return;
  }
  while (block_generation == generation) yield();
}

// Each lane gives a value and sees those of all 32.
template <class T>
static const T& exchanged(const T& value, unsigned lane) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = warps[self->warp];
  const unsigned generation = warp.generation;
  unsigned char(*values)[64] = warp.values[generation & 1];
  memcpy(values[self->lane], &value, sizeof(T));
  moved = true;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.generation++;
  }
  while (warp.generation == generation) yield();
  return *reinterpret_cast<const T*>(values[lane]);
}

static void fiber_main() {
  entry(entry_arguments);
  self->ended = true;
  moved = true;
  alive--;
  if (alive && block_arrived == alive) {
    block_arrived = 0;
    block_generation++;
  }
  yield();
}

// Runs all threads of one block to their end.
static void run_block(size_t shared_bytes) {
  constexpr size_t STACK = 64 << 10;
  static std::vector<Fiber> fibers;
  static std::vector<unsigned char> stacks, shared;
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  fibers.assign(threads, Fiber{});
  warps.assign((threads + 31) / 32, Warp{});
  if (stacks.size() < threads * STACK) stacks.resize(threads * STACK);
  shared.assign(shared_bytes + 16, 0xff);
  dynamic_shared = shared.data() + (16 - (uintptr_t)shared.data() % 16) % 16;
  block_arrived = block_generation = 0;
  alive = threads;
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    auto top = (uintptr_t)(stacks.data() + (i + 1) * STACK) & ~(uintptr_t)15;
    auto* words = (void**)top - 8;  // six registers, the return address, and one word so that the stack is aligned behind a call
    memset(words, 0, 64);
    words[6] = (void*)fiber_main;
    fiber.stack_pointer = words;
  }
  while (alive) {
    moved = false;
    for (auto& fiber : fibers) {
      if (fiber.ended) continue;
      self = &fiber;
      soft_switch(&scheduler, fiber.stack_pointer);
    }
    if (!moved && alive) {
      fprintf(stderr, "software device: %u threads wait for others that never come\n", alive);
      abort();
    }
  }
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <class T>
constexpr char kind_of() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_same_v<T, float>) return 'f';
  if (std::is_same_v<T, double>) return 'd';
  return sizeof(T) == 8 ? 'l' : 'u';
}
template <class... A>
static const char* kinds_of(void (*)(A...)) {
  static const char kinds[] = {kind_of<A>()..., 0};
  return kinds;
}
}  // namespace soft

DEVICE float from_lane_xor(float x, unsigned mask) { return soft::exchanged(x, soft::self->lane ^ mask); }
DEVICE unsigned from_lane_xor(unsigned x, unsigned mask) { return soft::exchanged(x, soft::self->lane ^ mask); }
DEVICE double from_lane_xor(double x, unsigned mask) { return soft::exchanged(x, soft::self->lane ^ mask); }
DEVICE uint64_t from_lane_xor(uint64_t x, unsigned mask) { return soft::exchanged(x, soft::self->lane ^ mask); }

DEVICE void copy16_async(void* to, const void* from, bool there) {
  if ((uintptr_t)to % 16 || (there && (uintptr_t)from % 16)) {
    fprintf(stderr, "software device: an asynchronous copy that is not aligned\n");
    abort();
  }
  if (there) memcpy(to, from, 16);
  else memset(to, 0, 16);
}
DEVICE void copies_commit() {}
template <int PENDING>
DEVICE void copies_wait() {}

DEVICE void load_matrices(uint32_t r[2], const bf16* row) {
  for (unsigned matrix = 0; matrix < 2; matrix++) {
    const bf16* from = soft::exchanged(row, matrix * 8 + soft::self->lane / 4);
    memcpy(&r[matrix], from + soft::self->lane % 4 * 2, 4);
  }
}
DEVICE void load_matrices_turned(uint32_t r[2], const bf16* row) {
  for (unsigned matrix = 0; matrix < 2; matrix++) {
    bf16 pair[2];
    for (unsigned i = 0; i < 2; i++) pair[i] = soft::exchanged(row, matrix * 8 + soft::self->lane % 4 * 2 + i)[soft::self->lane / 4];
    memcpy(&r[matrix], pair, 4);
  }
}
DEVICE void multiply_add(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } own, all[32];
  memcpy(own.a, a, 16);
  memcpy(own.b, b, 8);
  soft::exchanged(own, 0);
  soft::Warp& warp = soft::warps[soft::self->warp];
  for (unsigned i = 0; i < 32; i++) memcpy(&all[i], warp.values[(warp.generation - 1) & 1][i], sizeof(Fragments));
  auto half = [](uint32_t word, unsigned i) { return to_float(bf16{(uint16_t)(word >> (16 * i))}); };
  const unsigned group = soft::self->lane / 4, part = soft::self->lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = group + (i >> 1) * 8, column = part * 2 + (i & 1);
    float sum = 0.f;
    for (unsigned k = 0; k < 16; k++) {
      const float x = half(all[row % 8 * 4 + k % 8 / 2].a[(k / 8) * 2 + row / 8], k & 1);
      const float y = half(all[column * 4 + k % 8 / 2].b[k / 8], k & 1);
      sum += x * y;
    }
    c[i] += sum;
  }
}
