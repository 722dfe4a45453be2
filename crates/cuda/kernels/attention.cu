// Causal attention over a paged cache, for prefill chunks and decode alike: o = softmax(scale q Kᵀ) V over the visible keys.
//
// A block takes a tile: some queries of one sequence with all heads that share a KV head, as the 16-row tiles of the matrix unit
// (row r is query r / G, head r % G of the group). Keys pass in tiles of 32 through two stages of shared memory. Decode splits the
// keys over the grid's z into partial results, which `attend_combine` joins; how many splits there are is the bucket's
// matter, never the batch's.
#include "machine.cuh"

#define KEYS 32     // a tile of keys
#define UNSEEN -INFINITY

struct Sequences {
  const unsigned* tiles;      // [tiles, 2]: sequence, first query in it
  const unsigned* starts;     // [S]: first row of q
  const unsigned* lengths;    // [S]: queries; 0 pads a bucket
  const unsigned* positions;  // [S]: position of the first query
  const unsigned* blocks;     // [S, max_blocks]: blocks of the cache
};

// out [T, H Dh] if there is one split, else partial [T, H, splits, Dh] and its maxima and sums [T, H, splits, 2].
// q [T, H Dh]; caches [blocks block_size, Hkv Dh]. Grid (tiles, Hkv, splits), WARPS warps.
template <int DH, int WARPS>
DEVICE void attend(bf16* out, float* partial, float* extents, const bf16* q, const bf16* k_cache, const bf16* v_cache, Sequences s,
                   unsigned heads, unsigned kv_heads, unsigned block_size, unsigned max_blocks, unsigned window,
                   float scale, unsigned char* shared) {
  constexpr int ROW = DH + 8;  // padded: rows of a matrix lie in different banks
  const unsigned lane = threadIdx.x & 31u, warp = threadIdx.x >> 5, kv_head = blockIdx.y, splits = gridDim.z, split = blockIdx.z;
  const unsigned sequence = s.tiles[2 * blockIdx.x], first = s.tiles[2 * blockIdx.x + 1];
  const unsigned length = s.lengths[sequence], position = s.positions[sequence], start = s.starts[sequence];
  if (first >= length) return;
  const unsigned group = heads / kv_heads, queries = 16 * WARPS / group;
  const unsigned last = min(first + queries, length);      // behind the tile's last query
  const unsigned visible = position + last;                // behind the last key that any of its queries sees
  const unsigned oldest = window && position + first + 1 > window ? position + first + 1 - window : 0;
  const unsigned tiles = (visible + KEYS - 1) / KEYS, skipped = oldest / KEYS;
  const unsigned share = (tiles - skipped + splits - 1) / splits;
  const unsigned begin = skipped + split * share, end = min(begin + share, tiles);

  // The two rows of the tile that this thread holds parts of.
  const unsigned rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  bool real[2];
  unsigned at[2], head[2], query_row[2];
  for (int i = 0; i < 2; i++) {
    const unsigned query = first + rows[i] / group;
    real[i] = rows[i] / group < queries && query < last;
    at[i] = position + query;
    head[i] = kv_head * group + rows[i] % group;
    query_row[i] = start + query;
  }
  uint32_t qf[DH / 16][4];
#pragma unroll
  for (int k = 0; k < DH / 16; k++)
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const int i = part & 1, column = k * 16 + (part >> 1) * 8 + (int)(lane % 4) * 2;
      qf[k][part] = real[i] ? *(const uint32_t*)(q + ((size_t)query_row[i] * heads + head[i]) * DH + column) : 0u;
    }

  bf16* stages = (bf16*)shared;  // [2][K, V][KEYS][ROW]
  auto load = [&](unsigned tile, unsigned stage) {
    bf16* keys = stages + (size_t)stage * 2 * KEYS * ROW;
    bf16* values = keys + KEYS * ROW;
    for (unsigned i = threadIdx.x; i < KEYS * (DH / 8); i += WARPS * 32) {
      const unsigned row = i / (DH / 8), column = i % (DH / 8) * 8, key = tile * KEYS + row;
      const bool there = key < visible;
      const unsigned known = there ? key : 0;
      const size_t slot = (size_t)s.blocks[(size_t)sequence * max_blocks + known / block_size] * block_size + known % block_size;
      const size_t from = (slot * kv_heads + kv_head) * DH + column;
      copy16_async(keys + row * ROW + column, k_cache + from, there);
      copy16_async(values + row * ROW + column, v_cache + from, there);
    }
  };

  float o[DH / 8][4], largest[2] = {UNSEEN, UNSEEN}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < DH / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) o[n][i] = 0.f;
  const float scale_log2 = scale * 1.4426950408889634f;
  if (begin < end) load(begin, 0);
  copies_commit();
  for (unsigned tile = begin; tile < end; tile++) {
    const unsigned stage = (tile - begin) & 1;
    if (tile + 1 < end) load(tile + 1, stage ^ 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const bf16* keys = stages + (size_t)stage * 2 * KEYS * ROW;
    const bf16* values = keys + KEYS * ROW;

    float score[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) score[n][i] = 0.f;
#pragma unroll
      for (int k = 0; k < DH / 16; k++) {
        uint32_t b[2];
        load_matrices(b, keys + (n * 8 + lane % 8) * ROW + k * 16 + (lane / 8 % 2) * 8);
        multiply_add(score[n], qf[k], b);
      }
    }
    float high[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const unsigned row = i >> 1, key = tile * KEYS + n * 8 + lane % 4 * 2 + (i & 1);
        const bool seen = real[row] && key <= at[row] && (!window || key + window > at[row]);
        score[n][i] = seen ? score[n][i] * scale_log2 : UNSEEN;
        high[row] = fmaxf(high[row], score[n][i]);
      }
    float keep[2], base[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
      high[row] = fmaxf(high[row], from_lane_xor(high[row], 1));
      high[row] = fmaxf(high[row], from_lane_xor(high[row], 2));
      base[row] = high[row] == UNSEEN ? 0.f : high[row];
      keep[row] = largest[row] == UNSEEN ? 0.f : exp2f(largest[row] - base[row]);
      largest[row] = high[row];
      sum[row] *= keep[row];
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        score[n][i] = exp2f(score[n][i] - base[i >> 1]);
        sum[i >> 1] += score[n][i];
      }
#pragma unroll
    for (int n = 0; n < DH / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[n][i] *= keep[i >> 1];
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const float *left = score[2 * k], *right = score[2 * k + 1];
      const uint32_t weights[4] = {pair_of(left[0], left[1]), pair_of(left[2], left[3]), pair_of(right[0], right[1]),
                                   pair_of(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < DH / 8; n++) {
        uint32_t b[2];
        load_matrices_turned(b, values + (k * 16 + lane % 16) * ROW + n * 8);
        multiply_add(o[n], weights, b);
      }
    }
    __syncthreads();  // before this stage is loaded again
  }
  copies_wait<0>();

#pragma unroll
  for (int row = 0; row < 2; row++) {
    sum[row] += from_lane_xor(sum[row], 1);
    sum[row] += from_lane_xor(sum[row], 2);
  }
#pragma unroll
  for (int row = 0; row < 2; row++) {
    if (!real[row]) continue;
    const size_t to = (size_t)query_row[row] * heads + head[row];
    if (splits == 1) {
      const float factor = 1.f / sum[row];
#pragma unroll
      for (int n = 0; n < DH / 8; n++)
        *(uint32_t*)(out + to * DH + n * 8 + lane % 4 * 2) = pair_of(o[n][2 * row] * factor, o[n][2 * row + 1] * factor);
    } else {
      float* part = partial + (to * splits + split) * DH;
#pragma unroll
      for (int n = 0; n < DH / 8; n++) {
        part[n * 8 + lane % 4 * 2] = o[n][2 * row];
        part[n * 8 + lane % 4 * 2 + 1] = o[n][2 * row + 1];
      }
      if (lane % 4 == 0) {
        extents[(to * splits + split) * 2] = largest[row];
        extents[(to * splits + split) * 2 + 1] = sum[row];
      }
    }
  }
}

#define ATTEND(NAME, DH, WARPS)                                                                                                    \
  KERNEL NAME(bf16* out, float* partial, float* extents, const bf16* q, const bf16* k_cache, const bf16* v_cache,                  \
              const unsigned* tiles, const unsigned* starts, const unsigned* lengths, const unsigned* positions,                   \
              const unsigned* blocks, unsigned heads, unsigned kv_heads, unsigned block_size,                                      \
              unsigned max_blocks, unsigned window, float scale) {                                                                 \
    DYNAMIC_SHARED(shared);                                                                                                        \
    const Sequences s = {tiles, starts, lengths, positions, blocks};                                                               \
    attend<DH, WARPS>(out, partial, extents, q, k_cache, v_cache, s, heads, kv_heads, block_size, max_blocks, window,              \
                      scale, shared);                                                                                              \
  }
ATTEND(attend_16, 16, 4)
ATTEND(attend_64, 64, 4)
ATTEND(attend_128, 128, 4)
ATTEND(attend_16_one, 16, 1)
ATTEND(attend_64_one, 64, 1)
ATTEND(attend_128_one, 128, 1)

// out [T, H Dh] of the parts of `attend`; rows of sequences without queries give 0. Row t is sequence t. Grid (T, H).
KERNEL attend_combine(bf16* out, const float* partial, const float* extents, const unsigned* lengths, unsigned heads, unsigned dh,
                      unsigned splits) {
  const size_t to = (size_t)blockIdx.x * heads + blockIdx.y;
  const bool real = lengths[blockIdx.x] > 0;
  float largest = UNSEEN, sum = 0.f;
  for (unsigned i = 0; real && i < splits; i++) largest = fmaxf(largest, extents[(to * splits + i) * 2]);
  for (unsigned i = 0; real && i < splits; i++) {
    const float high = extents[(to * splits + i) * 2];
    if (high != UNSEEN) sum += extents[(to * splits + i) * 2 + 1] * exp2f(high - largest);
  }
  for (unsigned at = threadIdx.x; at < dh; at += blockDim.x) {
    float o = 0.f;
    for (unsigned i = 0; real && i < splits; i++) {
      const float high = extents[(to * splits + i) * 2];
      if (high != UNSEEN) o += partial[(to * splits + i) * dh + at] * exp2f(high - largest);
    }
    out[to * dh + at] = to_bf16(real ? o / sum : 0.f);
  }
}
