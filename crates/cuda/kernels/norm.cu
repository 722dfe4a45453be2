// Root-mean-square norms: y = x / sqrt(mean(x²) + eps) * gain, sums in f32. One block a row; D a multiple of 8.
#include "machine.cuh"

DEVICE float value_of(const bf16* x, unsigned at) { return to_float(x[at]); }
DEVICE float value_of(const float* x, unsigned at) { return x[at]; }

// Row x [D] -> y [D]; a null gain is 1.
template <class X>
DEVICE void norm_row(bf16* y, const X* x, const bf16* gain, unsigned d, float eps) {
  float squares = 0.f;
  for (unsigned at = threadIdx.x * 8; at < d; at += blockDim.x * 8)
    for (int i = 0; i < 8; i++) squares = fmaf(value_of(x, at + i), value_of(x, at + i), squares);
  const float factor = rsqrtf(block_sum(squares) / (float)d + eps);
  for (unsigned at = threadIdx.x * 8; at < d; at += blockDim.x * 8) {
    Eight g, out;
    if (gain) g = *(const Eight*)(gain + at);
    for (int i = 0; i < 8; i++) out.at[i] = to_bf16(value_of(x, at + i) * factor * (gain ? to_float(g.at[i]) : 1.f));
    *(Eight*)(y + at) = out;
  }
}

// x [T, D] -> y [T, D].
KERNEL rms_norm(bf16* y, const bf16* x, const bf16* gain, unsigned d, float eps) {
  const size_t row = (size_t)blockIdx.x * d;
  norm_row(y + row, x + row, gain, d, eps);
}

// The same of the residual stream h [T, D], which is f32.
KERNEL norm_residual(bf16* y, const float* h, const bf16* gain, unsigned d, float eps) {
  const size_t row = (size_t)blockIdx.x * d;
  norm_row(y + row, h + row, gain, d, eps);
}

// h [T, D] += y [T, D] in place; then x = norm(h).
KERNEL add_rms_norm(bf16* x, float* h, const float* y, const bf16* gain, unsigned d, float eps) {
  const size_t row = (size_t)blockIdx.x * d;
  for (unsigned at = threadIdx.x * 8; at < d; at += blockDim.x * 8)
    for (int i = 0; i < 8; i++) h[row + at + i] += y[row + at + i];  // the same thread reads it again below
  norm_row(x + row, (const float*)h + row, gain, d, eps);
}

// Each head's norm in place (Qwen 3). x [T, stride], heads `first` .. of Dh; gain [Dh]. Grid (T, heads), one warp each.
KERNEL head_norm(float* x, const bf16* gain, unsigned first, unsigned dh, unsigned stride, float eps) {
  float* head = x + (size_t)blockIdx.x * stride + (size_t)(first + blockIdx.y) * dh;
  float squares = 0.f;
  for (unsigned i = threadIdx.x; i < dh; i += 32) squares = fmaf(head[i], head[i], squares);
  const float factor = rsqrtf(warp_sum(squares) / (float)dh + eps);
  for (unsigned i = threadIdx.x; i < dh; i += 32) head[i] = head[i] * factor * to_float(gain[i]);
}
