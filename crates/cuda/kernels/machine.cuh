// What a kernel here may use of the machine: bf16, warp sums, asynchronous copies, the matrix unit.
//
// nvcc takes it from CUDA; any other C++ compiler takes it from ../soft/machine.h, where a block's threads run as fibers. So the
// text of every kernel runs in the tests, without a GPU. Kernels name nothing of CUDA that this file does not name.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE bf16 to_bf16(float x) { return __float2bfloat16(x); }
DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE float from_lane_xor(float x, unsigned mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE unsigned from_lane_xor(unsigned x, unsigned mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE double from_lane_xor(double x, unsigned mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint64_t from_lane_xor(uint64_t x, unsigned mask) { return __shfl_xor_sync(0xffffffffu, (unsigned long long)x, mask); }

// 16 bytes from device to shared memory; zeros if not `there` (then `from` is not read).
DEVICE void copy16_async(void* to, const void* from, bool there) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to), bytes = there ? 16u : 0u;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory"); }

// Two 8x8 matrices of bf16 from shared memory; lanes 0-7 name the rows of the first, 8-15 those of the second.
DEVICE void load_matrices(uint32_t r[2], const bf16* row) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
DEVICE void load_matrices_turned(uint32_t r[2], const bf16* row) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
// c [16, 8] += a [16, 16] b [16, 8], bf16 into f32, in the fragments of mma.sync.m16n8k16.
DEVICE void multiply_add(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
#include "../soft/machine.h"
#endif

struct alignas(16) Eight { bf16 at[8]; };        // one 16-byte access
struct alignas(16) EightFloats { float at[8]; };  // two

DEVICE uint32_t pair_of(float low, float high) {
  union { bf16 halves[2]; uint32_t word; } pair;
  pair.halves[0] = to_bf16(low);
  pair.halves[1] = to_bf16(high);
  return pair.word;
}

template <class T>
DEVICE T warp_sum(T x) {
  for (unsigned mask = 16; mask; mask >>= 1) x += from_lane_xor(x, mask);
  return x;
}

// The sum over a block of whole warps, the same in every thread: warps in order, so the same bits in every run.
template <class T>
DEVICE T block_sum(T x) {
  __shared__ T sums[32];
  const unsigned lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();  // an earlier sum may still be read
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  T sum = 0;
  for (unsigned i = 0; i < warps; i++) sum += sums[i];
  return sum;
}

// The largest of a block of whole warps, the same in every thread.
DEVICE uint64_t block_largest(uint64_t x) {
  __shared__ uint64_t each[32];
  const unsigned lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  for (unsigned mask = 16; mask; mask >>= 1) {
    const uint64_t other = from_lane_xor(x, mask);
    if (other > x) x = other;
  }
  __syncthreads();  // an earlier one may still be read
  if (lane == 0) each[warp] = x;
  __syncthreads();
  for (unsigned i = 0; i < warps; i++)
    if (each[i] > x) x = each[i];
  return x;
}
