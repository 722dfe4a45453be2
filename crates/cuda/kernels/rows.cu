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
KERNEL add_bias(bf16* x, const bf16* bias, unsigned n) {
  bf16* row = x + (size_t)blockIdx.x * n;
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) row[i] = to_bf16(to_float(row[i]) + to_float(bias[i]));
}

// mass [1] += the sum over rows of ||k|| ||v||, k [T, R1], v [T, R2]; in an order of its own, the same in every run. One block of 32 warps.
KERNEL add_mass(double* mass, const bf16* k, const bf16* v, unsigned rows, unsigned r1, unsigned r2) {
  __shared__ double sums[32];
  const unsigned lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  double sum = 0.;
  for (unsigned row = warp; row < rows; row += warps) {
    float kk = 0.f, vv = 0.f;
    for (unsigned i = lane; i < r1; i += 32) { const float x = to_float(k[(size_t)row * r1 + i]); kk += x * x; }
    for (unsigned i = lane; i < r2; i += 32) { const float x = to_float(v[(size_t)row * r2 + i]); vv += x * x; }
    sum += sqrt((double)warp_sum(kk) * (double)warp_sum(vv));
  }
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  double all = 0.;
  for (unsigned i = 0; i < warps; i++) all += sums[i];
  *mass += all;
}

// Rotary positions in the half-split layout, in place on q and k of qkv [T, (H + 2 Hkv) Dh], and k and v into their caches
// [slots, Hkv Dh] at cache_slots [T]; a slot beyond the cache (a row that pads a bucket) is not written. cos, sin [max, Dh/2].
KERNEL rope_append(bf16* qkv, bf16* k_cache, bf16* v_cache, const float* cos, const float* sin, const unsigned* positions,
                   const unsigned* cache_slots, unsigned heads, unsigned kv_heads, unsigned dh, unsigned slots) {
  const unsigned row = blockIdx.x, half = dh / 2, slot = cache_slots[row];
  bf16* x = qkv + (size_t)row * (heads + 2 * kv_heads) * dh;
  if (slot >= slots) return;
  const float *c = cos + (size_t)positions[row] * half, *s = sin + (size_t)positions[row] * half;
  for (unsigned i = threadIdx.x; i < (heads + kv_heads) * half; i += blockDim.x) {
    const unsigned head = i / half, at = i % half;
    bf16* pair = x + (size_t)head * dh + at;
    const float low = to_float(pair[0]), high = to_float(pair[half]);
    const bf16 turned_low = to_bf16(low * c[at] - high * s[at]), turned_high = to_bf16(high * c[at] + low * s[at]);
    pair[0] = turned_low;
    pair[half] = turned_high;
    if (head >= heads) {
      bf16* cached = k_cache + ((size_t)slot * kv_heads + (head - heads)) * dh + at;
      cached[0] = turned_low;
      cached[half] = turned_high;
    }
  }
  for (unsigned i = threadIdx.x; i < kv_heads * dh; i += blockDim.x)
    v_cache[(size_t)slot * kv_heads * dh + i] = x[(size_t)(heads + kv_heads) * dh + i];
}

// A number in (0, 1) that hangs on a row's seed and a token alone (the finaliser of SplitMix64).
DEVICE float uniform(unsigned seed, unsigned token) {
  uint64_t z = ((uint64_t)seed << 32 | token) + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return ((float)(z >> 41) + 0.5f) * (1.f / 8388608.f);
}

// out [T]: the token of the largest logit, the first of equals; at a temperature above 0 logit / temperature plus Gumbel noise of the
// row's seed, which draws from the softmax. logits [T, V]. One block a row.
KERNEL sample(unsigned* out, const float* logits, const float* temperatures, const unsigned* seeds, unsigned vocab) {
  __shared__ float values[32];
  __shared__ unsigned tokens[32];
  const float* row = logits + (size_t)blockIdx.x * vocab;
  const float temperature = temperatures[blockIdx.x];
  const unsigned seed = seeds[blockIdx.x], lane = threadIdx.x & 31u, warp = threadIdx.x >> 5;
  float best = -INFINITY;
  unsigned token = 0xffffffffu;
  for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) {
    float value = row[i];
    if (temperature > 0.f) value = value / temperature - logf(-logf(uniform(seed, i)));
    if (value > best || token == 0xffffffffu) { best = value; token = i; }
  }
  for (unsigned mask = 16; mask; mask >>= 1) {
    const float other = from_lane_xor(best, mask);
    const unsigned its = from_lane_xor(token, mask);
    if (other > best || (other == best && its < token)) { best = other; token = its; }
  }
  if (lane == 0) { values[warp] = best; tokens[warp] = token; }
  __syncthreads();
  if (threadIdx.x) return;
  for (unsigned i = 1; i < blockDim.x >> 5; i++)
    if (values[i] > best || (values[i] == best && tokens[i] < token)) { best = values[i]; token = tokens[i]; }
  out[blockIdx.x] = token;
}
