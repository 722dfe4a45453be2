// The per-session core at one site: c = scale (a U) Vᵀ with each row's own U, V out of an arena of slots.
//
// Which adapters are in the batch is data: slots [T], -1 for none. A slot holds Uᵀ [q, R1] and V [R2, q] of every site at fixed
// offsets; dense cores hold Nᵀ [R2, R1]. R1, R2 and q are multiples of 8. a and b are f32.
#include "machine.cuh"

// The dot product of a row of n floats and one of n bf16, over a warp.
DEVICE float dot_warp(const float* x, const bf16* y, unsigned n) {
  float sum = 0.f;
  for (unsigned at = (threadIdx.x & 31u) * 8; at < n; at += 256) {
    const EightFloats u = *(const EightFloats*)(x + at);
    const Eight v = *(const Eight*)(y + at);
    for (int i = 0; i < 8; i++) sum = fmaf(u.at[i], to_float(v.at[i]), sum);
  }
  return warp_sum(sum);
}

// b [T, q] f32 = a [T, R1] U. Grid (ceil(q / warps), T), one warp a column.
KERNEL core_down(float* b, const float* a, const bf16* arena, const int* slots, uint64_t slot_size, uint64_t offset, unsigned r1,
                 unsigned q) {
  const unsigned row = blockIdx.y, column = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  const int slot = slots[row];
  if (slot < 0 || column >= q) return;
  const bf16* u = arena + (size_t)slot * slot_size + offset;  // [q, R1]
  const float sum = dot_warp(a + (size_t)row * r1, u + (size_t)column * r1, r1);
  if ((threadIdx.x & 31u) == 0) b[(size_t)row * q + column] = sum;
}

// c [T, R2] = scales [T] b [T, q] Vᵀ; 0 for rows without a core. Grid (ceil(R2 / (threads / 16)), T), sixteen lanes a column.
KERNEL core_up(bf16* c, const float* b, const bf16* arena, const int* slots, const float* scales, uint64_t slot_size,
               uint64_t offset, unsigned r2, unsigned q) {
  const unsigned row = blockIdx.y, lane = threadIdx.x & 15u, column = blockIdx.x * (blockDim.x >> 4) + (threadIdx.x >> 4);
  const int slot = slots[row];
  float sum = 0.f;
  if (slot >= 0 && column < r2) {
    const bf16* v = arena + (size_t)slot * slot_size + offset + (size_t)column * q;  // row of [R2, q]
    for (unsigned at = lane * 8; at < q; at += 128) {
      const Eight e = *(const Eight*)(v + at);
      for (int i = 0; i < 8; i++) sum = fmaf(b[(size_t)row * q + at + i], to_float(e.at[i]), sum);
    }
  }
  for (unsigned mask = 8; mask; mask >>= 1) sum += from_lane_xor(sum, mask);
  if (lane == 0 && column < r2) c[(size_t)row * r2 + column] = to_bf16(slot < 0 ? 0.f : scales[row] * sum);
}

// c [T, R2] times what the gates of each row's core leave of it. A slot holds, for each site at `offset`, (G + lambda I)⁻¹ G [R1, R1] and
// behind it 1 - e as an f32, 0 without a gate. doubts [T, 2]: their sum over the sites that the row has passed, and how many. Grid (T).
KERNEL close_gates(bf16* c, float* doubts, const float* a, const bf16* arena, const int* slots, uint64_t slot_size, uint64_t offset,
                   unsigned r1, unsigned r2, float threshold, float width) {
  const unsigned row = blockIdx.x, lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int slot = slots[row];
  if (slot < 0) return;
  const bf16* known = arena + (size_t)slot * slot_size + offset;
  const float rest = *(const float*)(known + (size_t)r1 * r1);
  if (!(rest > 0.f)) return;
  const float* key = a + (size_t)row * r1;
  float spanned = 0.f, length = 0.f;
  for (unsigned i = warp; i < r1; i += warps) {
    const float own = dot_warp(key, known + (size_t)i * r1, r1);
    if (lane == 0) {
      spanned = fmaf(own, key[i], spanned);
      length = fmaf(key[i], key[i], length);
    }
  }
  spanned = block_sum(spanned);
  length = block_sum(length);
  const float leverage = length > 0.f ? spanned / length : 0.f;
  const float sum = doubts[2 * row] + (1.f - leverage) / rest, sites = doubts[2 * row + 1] + 1.f;
  const float open = 1.f / (1.f + expf((sum / sites - threshold) / width));
  for (unsigned i = threadIdx.x; i < r2; i += blockDim.x) c[(size_t)row * r2 + i] = to_bf16(to_float(c[(size_t)row * r2 + i]) * open);
  __syncthreads();  // all have read the doubts
  if (threadIdx.x == 0) {
    doubts[2 * row] = sum;
    doubts[2 * row + 1] = sites;
  }
}

// c [T, R2] = scales [T] a [T, R1] N for dense cores; 0 for rows without a core. Grid (ceil(R2 / warps), T), one warp a column.
KERNEL core_dense(bf16* c, const float* a, const bf16* arena, const int* slots, const float* scales, uint64_t slot_size,
                  uint64_t offset, unsigned r1, unsigned r2) {
  const unsigned row = blockIdx.y, column = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  const int slot = slots[row];
  if (column >= r2) return;
  float sum = 0.f;
  if (slot >= 0) sum = dot_warp(a + (size_t)row * r1, arena + (size_t)slot * slot_size + offset + (size_t)column * r1, r1);
  if ((threadIdx.x & 31u) == 0) c[(size_t)row * r2 + column] = to_bf16(slot < 0 ? 0.f : scales[row] * sum);
}
