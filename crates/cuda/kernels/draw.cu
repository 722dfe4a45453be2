// The next token of each row, drawn where its logits lie: what `engine::sampling` does on the host, with the same random number.
//
// Nothing is sorted. Tokens have an order (likeliest first, the lowest first among equals), and a place in it that is a whole number;
// how far the order is to be followed until weights or counts reach a sum is found bit by bit of that number, each bit a sum over the
// row. Sums are in f64 and in an order of their own, the same in every run. One block a row.
#include "machine.cuh"

// A row's draw, as `ops::Draw` lays it out.
struct Draw {
  unsigned wants;  // bit 0: a token, bit 1: its log-probability
  float temperature;
  unsigned top_k;
  float top_p, min_p, penalty;
  unsigned point[2];  // an f64 in [0, 1), its low word first
};

// One row's logits as they count: finite, and those of tokens that occurred are moved by the penalty.
struct Scores {
  const float* logits;
  const unsigned* seen;  // [ceil(V / 32)]
  float penalty, temperature;
  double best;
  unsigned vocab, id_bits;
};

DEVICE float tamed(float x) {
  const float most = 3.402823466e38f;
  return x != x ? -most : x > most ? most : x < -most ? -most : x;
}
DEVICE float untouched(const Scores& s, unsigned id) { return tamed(s.logits[id]); }
DEVICE float score(const Scores& s, unsigned id) {
  const float x = untouched(s, id);
  if (s.penalty == 1.f || !(s.seen[id >> 5] >> (id & 31u) & 1u)) return x;
  return tamed(x > 0.f ? x / s.penalty : x * s.penalty);
}
DEVICE double weight(const Scores& s, float score) { return exp(((double)score - s.best) / (double)s.temperature); }

// Larger for what comes earlier: by score, then by id; or by id alone.
template <bool BY_ID>
DEVICE uint64_t place(const Scores& s, float score, unsigned id) {
  const uint64_t back = ((uint64_t)1 << s.id_bits) - 1 - id;
  if (BY_ID) return back;
  union { float number; unsigned word; } bits;
  bits.number = score == 0.f ? 0.f : score;  // both zeros are one
  const unsigned key = bits.word >> 31 ? ~bits.word : bits.word | 0x80000000u;
  return (uint64_t)key << s.id_bits | back;
}

// The place at which the tokens from the first down to it, none below `least`, reach `target`: with their weights, or in number. Where
// `strict`, they exceed it. 0 if all of them do not.
template <bool BY_ID, bool COUNT>
DEVICE uint64_t reached_at(const Scores& s, uint64_t least, double target, bool strict) {
  uint64_t found = 0;
  double before = 0.;
  for (int bit = (BY_ID ? 0 : 32) + (int)s.id_bits - 1; bit >= 0; bit--) {
    const uint64_t tried = found | (uint64_t)1 << bit;
    double own = 0.;
    for (unsigned id = threadIdx.x; id < s.vocab; id += blockDim.x) {
      const float x = score(s, id);
      const uint64_t at = place<BY_ID>(s, x, id);
      if (at >= least && at >> bit == tried >> bit) own += COUNT ? 1. : weight(s, x);
    }
    own = block_sum(own);
    if (strict ? target < before + own : before + own >= target) found = tried;
    else before += own;
  }
  return found;
}

// The weights of all tokens from the first down to `least`.
DEVICE double mass(const Scores& s, uint64_t least) {
  double sum = 0.;
  for (unsigned id = threadIdx.x; id < s.vocab; id += blockDim.x) {
    const float x = score(s, id);
    if (place<false>(s, x, id) >= least) sum += weight(s, x);
  }
  return block_sum(sum);
}

// The last token in order with a weight, at `least` or before it.
template <bool BY_ID>
DEVICE unsigned last_from(const Scores& s, uint64_t least) {
  uint64_t turned = 0;  // the largest of what is the smallest turned round
  for (unsigned id = threadIdx.x; id < s.vocab; id += blockDim.x) {
    const float x = score(s, id);
    const uint64_t at = place<BY_ID>(s, x, id);
    if (at >= least && weight(s, x) > 0. && ~at > turned) turned = ~at;
  }
  turned = ~block_largest(turned);
  return (unsigned)((((uint64_t)1 << s.id_bits) - 1) - (turned & (((uint64_t)1 << s.id_bits) - 1)));
}

// A token by `point` of the weights of what is kept.
DEVICE unsigned drawn_of(const Scores& s, const Draw& d, double point) {
  const bool some = d.top_k > 0 && d.top_k < s.vocab;
  if (d.top_k == 0 && d.top_p == 1.f && d.min_p == 0.f)
    return last_from<true>(s, reached_at<true, false>(s, 0, point * mass(s, 0), true));
  // Each filter keeps a beginning of the order: the latest of their ends is the end of what all of them keep.
  const uint64_t by_count = some ? reached_at<false, true>(s, 0, (double)d.top_k, false) : 0;
  uint64_t end = by_count;
  if (d.top_p < 1.f) {
    const uint64_t by_mass = reached_at<false, false>(s, by_count, (double)d.top_p * mass(s, by_count), false);
    if (by_mass > end) end = by_mass;
  }
  if (d.min_p > 0.f) {
    uint64_t turned = 0;
    for (unsigned id = threadIdx.x; id < s.vocab; id += blockDim.x) {
      const float x = score(s, id);
      const uint64_t at = place<false>(s, x, id);
      if (weight(s, x) >= (double)d.min_p && ~at > turned) turned = ~at;
    }
    const uint64_t by_least = ~block_largest(turned);
    if (by_least > end) end = by_least;
  }
  const uint64_t at = reached_at<false, false>(s, end, point * mass(s, end), true);
  return last_from<false>(s, at > end ? at : end);
}

// out [T]: tokens of logits [T, V]; logprobs [T] of the distribution before penalty, temperature and filters. seen [T, ceil(V / 32)] has a
// bit for each token that a penalty is for. Rows that want nothing are left alone.
KERNEL draw(unsigned* out, float* logprobs, const float* logits, const Draw* draws, const unsigned* seen, unsigned vocab) {
  const Draw d = draws[blockIdx.x];
  if (!(d.wants & 1u)) return;
  Scores s = {logits + (size_t)blockIdx.x * vocab, seen + (size_t)blockIdx.x * ((vocab + 31) / 32), d.penalty, d.temperature, 0., vocab, 1};
  while (((uint64_t)1 << s.id_bits) < vocab) s.id_bits++;
  uint64_t first = 0;
  for (unsigned id = threadIdx.x; id < vocab; id += blockDim.x) {
    const uint64_t at = place<false>(s, score(s, id), id);
    if (at > first) first = at;
  }
  const uint64_t ids = ((uint64_t)1 << s.id_bits) - 1;
  unsigned token = (unsigned)(ids - (block_largest(first) & ids));
  s.best = (double)score(s, token);
  if (d.temperature > 0.f) {
    union { unsigned words[2]; double number; } point = {{d.point[0], d.point[1]}};
    token = drawn_of(s, d, point.number);
  }
  if (d.wants & 2u) {
    double best = -INFINITY, sum = 0.;
    uint64_t likeliest = 0;
    for (unsigned id = threadIdx.x; id < vocab; id += blockDim.x) {
      const uint64_t at = place<false>(s, untouched(s, id), id);
      if (at > likeliest) likeliest = at;
    }
    best = (double)untouched(s, (unsigned)(ids - (block_largest(likeliest) & ids)));
    for (unsigned id = threadIdx.x; id < vocab; id += blockDim.x) sum += exp((double)untouched(s, id) - best);
    sum = block_sum(sum);
    if (threadIdx.x == 0) logprobs[blockIdx.x] = (float)((double)untouched(s, token) - (best + log(sum)));
  }
  if (threadIdx.x == 0) out[blockIdx.x] = token;
}
