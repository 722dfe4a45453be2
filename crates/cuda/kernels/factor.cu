// The parts of a read-out that are no matrix products, in f64: one block a matrix, every loop in a fixed order.
#include "machine.cuh"

#define BLOCK 64  // the diagonal blocks of a Cholesky factorisation

// a [B, n, n] f64 = (g + gᵀ) / 2 + lambda I of g [B, n, n] f32. Grid (n, B).
KERNEL symmetric(double* a, const float* g, const double* lambdas, unsigned n) {
  const size_t matrix = (size_t)blockIdx.y * n * n;
  const unsigned row = blockIdx.x;
  for (unsigned column = threadIdx.x; column < n; column += blockDim.x) {
    const double value = 0.5 * ((double)g[matrix + (size_t)row * n + column] + (double)g[matrix + (size_t)column * n + row]);
    a[matrix + (size_t)row * n + column] = value + (row == column ? lambdas[blockIdx.y] : 0.0);
  }
}

// to [n] f64 = from [n] f32.
KERNEL widen(double* to, const float* from, uint64_t n) {
  for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
    to[i] = (double)from[i];
}

// to [rows, columns] = from, rows of `to_stride` and `from_stride`, matrices of `to_size` and `from_size` apart. Grid (rows, B).
KERNEL copy_block(double* to, const double* from, unsigned columns, unsigned to_stride, unsigned from_stride, uint64_t to_size,
                  uint64_t from_size) {
  to += blockIdx.y * to_size + (uint64_t)blockIdx.x * to_stride;
  from += blockIdx.y * from_size + (uint64_t)blockIdx.x * from_stride;
  for (unsigned i = threadIdx.x; i < columns; i += blockDim.x) to[i] = from[i];
}

// a [B, n, n] += eps tr(a) I: so that the factor of a Gram matrix without full rank exists. Grid (B).
KERNEL shift_diagonal(double* a, unsigned n, double eps) {
  __shared__ double shift;
  a += (uint64_t)blockIdx.x * n * n;
  if (threadIdx.x == 0) {
    double trace = 0.0;
    for (unsigned i = 0; i < n; i++) trace += a[(uint64_t)i * n + i];
    shift = eps * trace > 0.0 ? eps * trace : 1.0;  // the factor of 0 is I: what is 0 stays 0
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) a[(uint64_t)i * n + i] += shift;
}

// The diagonal block of `size` <= 64 at `at` of a [B, n, n] becomes its lower Cholesky factor L in place; inverse [B, 64, 64] = L⁻¹.
// failed [B] = 1 where a pivot is not positive (or no number). Grid (B).
KERNEL factor_block(double* a, double* inverse, unsigned* failed, unsigned n, unsigned at, unsigned size) {
  __shared__ double l[BLOCK][BLOCK + 1];
  __shared__ unsigned broken;
  a += (uint64_t)blockIdx.x * n * n + (uint64_t)at * n + at;
  inverse += (uint64_t)blockIdx.x * BLOCK * BLOCK;
  if (threadIdx.x == 0) broken = 0;
  for (unsigned i = threadIdx.x; i < size * size; i += blockDim.x) l[i / size][i % size] = a[(uint64_t)(i / size) * n + i % size];
  __syncthreads();
  for (unsigned j = 0; j < size; j++) {
    if (threadIdx.x == 0) {
      if (!(l[j][j] > 0.0)) { broken = 1; l[j][j] = 1.0; }
      l[j][j] = sqrt(l[j][j]);
    }
    __syncthreads();
    for (unsigned i = j + 1 + threadIdx.x; i < size; i += blockDim.x) l[i][j] /= l[j][j];
    __syncthreads();
    const unsigned below = size - j - 1;
    for (unsigned i = threadIdx.x; i < below * below; i += blockDim.x) {
      const unsigned row = j + 1 + i / below, column = j + 1 + i % below;
      if (column <= row) l[row][column] -= l[row][j] * l[column][j];
    }
    __syncthreads();
  }
  for (unsigned i = threadIdx.x; i < size * size; i += blockDim.x) {
    const unsigned row = i / size, column = i % size;
    a[(uint64_t)row * n + column] = column <= row ? l[row][column] : 0.0;
  }
  // A column of the inverse a thread, from the top.
  for (unsigned column = threadIdx.x; column < size; column += blockDim.x)
    for (unsigned row = 0; row < size; row++) {
      double sum = row == column ? 1.0 : 0.0;
      for (unsigned k = column; k < row; k++) sum -= l[row][k] * inverse[k * BLOCK + column];
      inverse[row * BLOCK + column] = row < column ? 0.0 : sum / l[row][row];
    }
  if (threadIdx.x == 0 && broken) failed[blockIdx.x] = 1;
}

// Eigenvalues [B, p] of symmetric a [B, p, p], descending, and their vectors as columns of w [B, p, p], by cyclic Jacobi in rounds of
// p/2 disjoint rotations, p even. `turned` [B, p, p] is scratch. Grid (B); p² + 2p doubles of shared memory.
KERNEL eigen(double* values, double* w, double* turned, const double* a, unsigned p, unsigned sweeps) {
  DYNAMIC_SHARED(shared);
  double* m = (double*)shared;       // [p, p]
  double *c = m + p * p, *s = c + p / 2, *diagonal = s + p / 2;
  a += (uint64_t)blockIdx.x * p * p;
  w += (uint64_t)blockIdx.x * p * p;
  turned += (uint64_t)blockIdx.x * p * p;
  for (unsigned i = threadIdx.x; i < p * p; i += blockDim.x) {
    m[i] = a[i];
    turned[i] = i / p == i % p ? 1.0 : 0.0;  // rows are vectors here
  }
  __syncthreads();
  for (unsigned round = 0; round < sweeps * (p - 1); round++) {
    // A tournament: player p-1 stays, the others move on by one a round.
    auto pair = [&](unsigned k, unsigned& i, unsigned& j) {
      const unsigned turn = round % (p - 1);
      i = k == 0 ? p - 1 : (turn + k) % (p - 1);
      j = (turn + p - 1 - k) % (p - 1);
      if (i > j) { const unsigned other = i; i = j; j = other; }
    };
    for (unsigned k = threadIdx.x; k < p / 2; k += blockDim.x) {
      unsigned i, j;
      pair(k, i, j);
      const double off = m[i * p + j];
      c[k] = 1.0;
      s[k] = 0.0;
      if (off != 0.0) {
        const double theta = (m[j * p + j] - m[i * p + i]) / (2.0 * off);
        const double t = (theta >= 0.0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1.0));
        c[k] = 1.0 / sqrt(t * t + 1.0);
        s[k] = t * c[k];
      }
    }
    __syncthreads();
    for (unsigned at = threadIdx.x; at < p / 2 * p; at += blockDim.x) {  // columns of m
      const unsigned k = at % (p / 2), row = at / (p / 2);
      unsigned i, j;
      pair(k, i, j);
      const double x = m[row * p + i], y = m[row * p + j];
      m[row * p + i] = c[k] * x - s[k] * y;
      m[row * p + j] = s[k] * x + c[k] * y;
    }
    __syncthreads();
    for (unsigned at = threadIdx.x; at < p / 2 * p; at += blockDim.x) {  // rows of m, and of the vectors
      const unsigned k = at / p, column = at % p;
      unsigned i, j;
      pair(k, i, j);
      const double x = m[i * p + column], y = m[j * p + column];
      m[i * p + column] = c[k] * x - s[k] * y;
      m[j * p + column] = s[k] * x + c[k] * y;
      const double u = turned[i * p + column], v = turned[j * p + column];
      turned[i * p + column] = c[k] * u - s[k] * v;
      turned[j * p + column] = s[k] * u + c[k] * v;
    }
    __syncthreads();
  }
  for (unsigned i = threadIdx.x; i < p; i += blockDim.x) diagonal[i] = m[i * p + i];
  __syncthreads();
  for (unsigned i = threadIdx.x; i < p; i += blockDim.x) {
    unsigned rank = 0;
    for (unsigned j = 0; j < p; j++) rank += diagonal[j] > diagonal[i] || (diagonal[j] == diagonal[i] && j < i);
    values[(uint64_t)blockIdx.x * p + rank] = diagonal[i];
    for (unsigned k = 0; k < p; k++) w[(uint64_t)k * p + rank] = turned[i * p + k];
  }
}

// A low-rank core out of u [B, n, p] and v [B, r, p], values [B, p] squared singular values, descending: Uᵀ [q, n] and V [r, q] bf16 at
// `offset` + b * `site_size` of a slot. v's columns are divided by sigma; u's multiplied by it if `fold`. Columns q .. and those with
// sigma at or below max(relative * sigma_1, floors [B]) are 0. Grid (q, B).
KERNEL emit_low_rank(bf16* slot, const double* u, const double* v, const double* values, const double* floors, unsigned n, unsigned r,
                     unsigned p, unsigned q, uint64_t offset, uint64_t site_size, double relative, unsigned fold) {
  const unsigned column = blockIdx.x, b = blockIdx.y;
  const double sigma = column < p ? sqrt(fmax(values[(uint64_t)b * p + column], 0.0)) : 0.0;
  const double first = sqrt(fmax(values[(uint64_t)b * p], 0.0)), cutoff = fmax(relative * first, floors[b]);
  const bool kept = column < p && sigma > cutoff;
  bf16 *ut = slot + offset + b * site_size, *vq = ut + (uint64_t)q * n;
  u += (uint64_t)b * n * p;
  v += (uint64_t)b * r * p;
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x)
    ut[(uint64_t)column * n + i] = to_bf16(kept ? (float)(u[(uint64_t)i * p + column] * (fold ? sigma : 1.0)) : 0.f);
  for (unsigned i = threadIdx.x; i < r; i += blockDim.x)
    vq[(uint64_t)i * q + column] = to_bf16(kept ? (float)(v[(uint64_t)i * p + column] / sigma) : 0.f);
}

// A dense core out of x [B, n, r]: Nᵀ [r, n] bf16 at `offset` + b * `site_size` of a slot. Grid (r, B).
KERNEL emit_dense(bf16* slot, const double* x, unsigned n, unsigned r, uint64_t offset, uint64_t site_size) {
  bf16* to = slot + offset + blockIdx.y * site_size + (uint64_t)blockIdx.x * n;
  x += (uint64_t)blockIdx.y * n * r;
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) to[i] = to_bf16((float)x[(uint64_t)i * r + blockIdx.x]);
}
