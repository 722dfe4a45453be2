// Weights as GGUF has them: 32 neighbours of a row share a scale d and a minimum m, w = d code + m.
//
// codes [out, in / 32, bits] words: of 4 bits those of inputs 0-15 are the low halves of bytes, those of 16-31 the high ones; 8 bits have a
// sign. scales [out, in / 32]: d in the low half of a word, m in the high one, both f16.
#include "machine.cuh"

#define MOST_ROWS 8  // of `multiply_quantised`: all of them for one reading of the weights

template <int BITS>
DEVICE void decode(float w[32], const unsigned* codes, unsigned scale) {
  const float d = half_to_float((uint16_t)scale), m = half_to_float((uint16_t)(scale >> 16));
#pragma unroll
  for (int word = 0; word < BITS; word++) {
    const unsigned four = codes[word];
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
      const unsigned bits = four >> (8 * byte);
      if (BITS == 4) {
        w[word * 4 + byte] = fmaf((float)(bits & 15u), d, m);
        w[16 + word * 4 + byte] = fmaf((float)(bits >> 4 & 15u), d, m);
      } else {
        w[word * 4 + byte] = fmaf((float)(signed char)(bits & 255u), d, m);
      }
    }
  }
}

// to [out, in] of `blocks` = out in / 32 blocks. One thread a block.
template <int BITS>
DEVICE void dequantise(bf16* to, const unsigned* codes, const unsigned* scales, uint64_t blocks) {
  const uint64_t block = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (block >= blocks) return;
  float w[32];
  decode<BITS>(w, codes + block * BITS, scales[block]);
#pragma unroll
  for (int part = 0; part < 4; part++) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.at[i] = to_bf16(w[part * 8 + i]);
    *(Eight*)(to + block * 32 + part * 8) = out;
  }
}
KERNEL dequantise_4(bf16* to, const unsigned* codes, const unsigned* scales, uint64_t blocks) { dequantise<4>(to, codes, scales, blocks); }
KERNEL dequantise_8(bf16* to, const unsigned* codes, const unsigned* scales, uint64_t blocks) { dequantise<8>(to, codes, scales, blocks); }

DEVICE void store(float* y, float value) { *y = value; }
DEVICE void store(bf16* y, float value) { *y = to_bf16(value); }

// y [T, out] = x [T, in] Wᵀ for up to MOST_ROWS rows, sums in f32. Grid (ceil(out / warps)), one warp a column.
template <int BITS, class Y>
DEVICE void multiply_quantised(Y* y, const bf16* x, const unsigned* codes, const unsigned* scales, unsigned rows, unsigned out,
                               unsigned in) {
  const unsigned lane = threadIdx.x & 31u, column = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), blocks = in / 32;
  if (column >= out) return;
  float sums[MOST_ROWS];
#pragma unroll
  for (int row = 0; row < MOST_ROWS; row++) sums[row] = 0.f;
  for (unsigned block = lane; block < blocks; block += 32) {
    const size_t at = (size_t)column * blocks + block;
    float w[32];
    decode<BITS>(w, codes + at * BITS, scales[at]);
#pragma unroll
    for (int row = 0; row < MOST_ROWS; row++) {
      if (row >= (int)rows) continue;
      const bf16* from = x + (size_t)row * in + block * 32;
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const Eight eight = *(const Eight*)(from + part * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) sums[row] = fmaf(w[part * 8 + i], to_float(eight.at[i]), sums[row]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < MOST_ROWS; row++) {
    if (row >= (int)rows) continue;
    const float sum = warp_sum(sums[row]);
    if (lane == 0) store(y + (size_t)row * out + column, sum);
  }
}
#define MULTIPLY(NAME, BITS, Y)                                                                                              \
  KERNEL NAME(Y* y, const bf16* x, const unsigned* codes, const unsigned* scales, unsigned rows, unsigned out, unsigned in) { \
    multiply_quantised<BITS, Y>(y, x, codes, scales, rows, out, in);                                                         \
  }
MULTIPLY(multiply_4, 4, bf16)
MULTIPLY(multiply_4_wide, 4, float)
MULTIPLY(multiply_8, 8, bf16)
MULTIPLY(multiply_8_wide, 8, float)
