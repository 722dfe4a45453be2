// What moves rows or changes them element by element. Sizes of rows are multiples of 8.
#include "machine.cuh"

// out [T, D] = table [V, D] at index [T]; an index beyond the table gives zeros. One block a row.
KERNEL gather_rows(bf16* out, const bf16* table, const unsigned* index, unsigned d, unsigned rows) {
  const unsigned from = index[blockIdx.x];
  for (unsigned at = threadIdx.x * 8; at < d; at += blockDim.x * 8) {
    Eight v;
    for (int i = 0; i < 8; i++) v.at[i] = to_bf16(0.f);
    if (from < rows) v = *(const Eight*)(table + (size_t)from * d + at);
    *(Eight*)(out + (size_t)blockIdx.x * d + at) = v;
  }
}

// The same into f32: what the residual stream begins with.
KERNEL gather_residual(float* out, const bf16* table, const unsigned* index, unsigned d, unsigned rows) {
  const unsigned from = index[blockIdx.x];
  for (unsigned at = threadIdx.x; at < d; at += blockDim.x)
    out[(size_t)blockIdx.x * d + at] = from < rows ? to_float(table[(size_t)from * d + at]) : 0.f;
}

// m [T, F] = silu(gate) up, both beside each other in gate_up [T, 2F]. Grid (T, ceil(F / 8 / threads)).
KERNEL silu_mul(bf16* m, const bf16* gate_up, unsigned f) {
  const unsigned at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (at >= f) return;
  const bf16* row = gate_up + (size_t)blockIdx.x * 2 * f;
  const Eight gate = *(const Eight*)(row + at), up = *(const Eight*)(row + f + at);
  Eight out;
  for (int i = 0; i < 8; i++) {
    const float g = to_float(gate.at[i]);
    out.at[i] = to_bf16(g / (1.f + expf(-g)) * to_float(up.at[i]));
  }
  *(Eight*)(m + (size_t)blockIdx.x * f + at) = out;
}

// x [T, N] += bias [N]. One block a row.
KERNEL add_bias(float* x, const bf16* bias, unsigned n) {
  float* row = x + (size_t)blockIdx.x * n;
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) row[i] += to_float(bias[i]);
}

// to [n] = from [n], rounded; n a multiple of 8.
KERNEL narrow(bf16* to, const float* from, uint64_t n) {
  const uint64_t at = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  const EightFloats wide = *(const EightFloats*)(from + at);
  Eight out;
  for (int i = 0; i < 8; i++) out.at[i] = to_bf16(wide.at[i]);
  *(Eight*)(to + at) = out;
}

// to [n] += weight from [n]; n a multiple of 8.
KERNEL add_scaled(float* to, const float* from, float weight, uint64_t n) {
  const uint64_t at = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= n) return;
  const EightFloats more = *(const EightFloats*)(from + at);
  EightFloats sum = *(EightFloats*)(to + at);
  for (int i = 0; i < 8; i++) sum.at[i] = fmaf(weight, more.at[i], sum.at[i]);
  *(EightFloats*)(to + at) = sum;
}

// to [n] += weight from [n]. One block.
KERNEL add_scaled_masses(double* to, const double* from, double weight, unsigned n) {
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) to[i] += weight * from[i];
}

// mass [1] += the sum over rows of ||k|| ||v||, k [T, R1], v [T, R2]; in an order of its own, the same in every run. One block of 32 warps.
KERNEL add_mass(double* mass, const float* k, const float* v, unsigned rows, unsigned r1, unsigned r2) {
  __shared__ double sums[32];
  const unsigned lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  double sum = 0.;
  for (unsigned row = warp; row < rows; row += warps) {
    float kk = 0.f, vv = 0.f;
    for (unsigned i = lane; i < r1; i += 32) { const float x = k[(size_t)row * r1 + i]; kk += x * x; }
    for (unsigned i = lane; i < r2; i += 32) { const float x = v[(size_t)row * r2 + i]; vv += x * x; }
    sum += sqrt((double)warp_sum(kk) * (double)warp_sum(vv));
  }
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  double all = 0.;
  for (unsigned i = 0; i < warps; i++) all += sums[i];
  *mass += all;
}

// Rotary positions in the half-split layout, from rows of qkv [T, (H + 2 Hkv) Dh] to q [T, H Dh], and k and v into their caches
// [slots, Hkv Dh] at cache_slots [T]; a row whose slot is beyond the cache (it pads a bucket) is left out. cos, sin [max, Dh/2].
KERNEL rope_append(bf16* q, const float* qkv, bf16* k_cache, bf16* v_cache, const float* cos, const float* sin,
                   const unsigned* positions, const unsigned* cache_slots, unsigned heads, unsigned kv_heads, unsigned dh,
                   unsigned slots) {
  const unsigned row = blockIdx.x, half = dh / 2, slot = cache_slots[row];
  const float* x = qkv + (size_t)row * (heads + 2 * kv_heads) * dh;
  if (slot >= slots) return;
  const float *c = cos + (size_t)positions[row] * half, *s = sin + (size_t)positions[row] * half;
  for (unsigned i = threadIdx.x; i < (heads + kv_heads) * half; i += blockDim.x) {
    const unsigned head = i / half, at = i % half;
    const float low = x[(size_t)head * dh + at], high = x[(size_t)head * dh + half + at];
    bf16* to = head < heads ? q + ((size_t)row * heads + head) * dh : k_cache + ((size_t)slot * kv_heads + (head - heads)) * dh;
    to[at] = to_bf16(low * c[at] - high * s[at]);
    to[half + at] = to_bf16(high * c[at] + low * s[at]);
  }
  for (unsigned i = threadIdx.x; i < kv_heads * dh; i += blockDim.x)
    v_cache[(size_t)slot * kv_heads * dh + i] = to_bf16(x[(size_t)(heads + kv_heads) * dh + i]);
}
