/* tile.h - a range of one tensor, tile by tile: the walk that every instruction set shares.
 *
 * Per tile of at most Stages::TILE consecutive elements, all in L1, for every pass of the job:
 *   sum      s[a] = sum_k c_k z_k        Stages::sum: K Philox calls per 16 (Gaussian) or 128 (Rademacher) elements;
 *                                        with factors, low_rank: 2 * rank operations per element
 *   scale    s[a] *= scale[i div B]      only if there is a scale
 *   keep     1 bit per element           only if there is a mask; Stages::random_keep: one call per 8 elements; once
 *   round    16 bits per element         only if stochastic; Stages::rounding_bits: one call per 8 elements
 *   apply    dst = cast(d + s)           Stages::apply: reads and writes the weights, from the second pass on in L1
 *
 * The noise goes through an L1 buffer, which makes offsets, tails, rows, masks, scales and both casts one path. A pass
 * of Gaussian terms without masks and scales goes straight from registers to the weights instead, in whole blocks
 * (Stages::lean), with a decay and with either cast: that saves stores and loads, and the weights are read while noise
 * is computed rather than after it.
 *
 * Belongs here: memory access in units of tiles. Does not belong here: arithmetic of the contract (noise.h, simd.h).
 * Everything has internal linkage, see perturb.h.
 */
#ifndef ZO_CPU_TILE_H
#define ZO_CPU_TILE_H

#include <string.h>

#include "../noise.h"
#include "perturb.h"

namespace zo {
namespace {

/* Stages may write and read up to this many elements behind a tile's end, so that they work in whole vectors. */
constexpr int PAD = 64;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* s[p] = c times the sum over rho of left[row][rho] * right[rho][column], of element i + p. */
inline void low_rank(const zo_tensor &t, float c, uint64_t i, int64_t n, float *s) {
  const uint64_t cols = (uint64_t)t.cols;
  uint64_t row = i / cols, column = i % cols;
  for (int64_t p = 0; p < n; ++row, column = 0) {
    const int64_t length = smaller(n - p, (int64_t)(cols - column));
    const float *const left = t.left + row * t.rank;
    float *const z = s + p;
    for (int64_t j = 0; j < length; ++j) z[j] = 0;
    for (uint64_t rho = 0; rho < t.rank; ++rho) {
      const float x = left[rho], *const y = t.right + (rho * cols + column);
      for (int64_t j = 0; j < length; ++j) z[j] += x * y[j]; /* an exact product */
    }
    for (int64_t j = 0; j < length; ++j) z[j] = mul_rn(c, z[j]);
    p += length;
  }
}

/* s[p] *= the scale of element i + p. */
inline void multiply_scales(const zo_tensor &t, uint64_t i, int64_t n, float *s) {
  const uint64_t block = (uint64_t)t.scale_block, first = (uint64_t)t.offset / block;
  if (block == 1) { /* in vectors, and without a division of indices for each element */
    const float *const x = t.scale + (i - first);
    if (t.rsqrt) {
      for (int64_t p = 0; p < n; ++p) s[p] = mul_rn(s[p], inverse_root(x[p]));
    } else {
      for (int64_t p = 0; p < n; ++p) s[p] = mul_rn(s[p], x[p]);
    }
    return;
  }
  for (int64_t p = 0; p < n;) {
    const uint64_t b = (i + p) / block;
    const int64_t stop = smaller(n, (int64_t)((b + 1) * block - i));
    const float x = t.scale[b - first], c = t.rsqrt ? inverse_root(x) : x;
    for (; p < stop; ++p) s[p] = mul_rn(s[p], c);
  }
}

/* Bits [from, from + n) of `mask` to bits [at, at + n) of `keep` (and-ed), reading no byte outside the n bits. */
inline void and_bit_mask(const uint8_t *mask, int64_t from, int64_t n, uint8_t *keep, int64_t at) {
  int64_t p = 0;
  if (((from | at) & 7) == 0) { /* all but odd shards, and the only case that has to be fast */
    for (; p + 8 <= n; p += 8) keep[(at + p) >> 3] &= mask[(from + p) >> 3];
  }
  while (p < n) {
    const int in = (int)((from + p) & 7), out = (int)((at + p) & 7);
    const int count = (int)smaller(n - p, 8 - (in > out ? in : out));
    const uint32_t dropped = ~((uint32_t)mask[(from + p) >> 3] >> in) & ((1u << count) - 1);
    keep[(at + p) >> 3] &= (uint8_t)~(dropped << out);
    p += count;
  }
}

/* Elements e .. end - 1, whose indices are i, i + 1, ... */
template <class Stages, class Weight>
void perturb_run(const Job &job, const zo_tensor &t, int64_t e, int64_t end, uint64_t i) {
  alignas(64) float s[Stages::TILE + PAD];
  alignas(64) uint16_t rounding[Stages::TILE + PAD];
  alignas(64) uint8_t keep[(Stages::TILE + PAD) / 8];
  const Weight *src = (const Weight *)t.src;
  Weight *dst = (Weight *)t.dst;
  const bool masked = t.mask || t.keep;
  while (e < end) {
    if constexpr (Stages::LEAN) {
      if (!job.next) {
        if (const int64_t done = Stages::template lean<Weight>(job, t, src + e, dst + e, end - e, i)) {
          e += done;
          i += (uint64_t)done;
          continue;
        }
      }
    }
    const uint64_t start = i & ~(uint64_t)127; /* where a call of every purpose begins */
    const int64_t head = (int64_t)(i - start);
    const int64_t n = smaller(end - e, Stages::TILE - head), len = head + n;
    const Weight *from = src + e;
    bool kept = false; /* whether `keep` is that of this tile */
    for (const Job *pass = &job; pass; pass = pass->next) {
      if constexpr (Stages::LEAN) { /* all of the tile or none of it */
        if (n % Stages::BLOCK == 0 && Stages::template lean<Weight>(*pass, t, from, dst + e, n, i)) {
          from = dst + e;
          continue;
        }
      }
      if (pass->n_terms) {
        t.rank ? low_rank(t, pass->terms[0].c, i, n, s + head) : Stages::sum(*pass, t.stream, start, len, s);
        if (t.scale) multiply_scales(t, i, n, s + head);
        if (masked && !kept) {
          if (t.keep) {
            Stages::random_keep(pass->seed, t, start, len, keep);
          } else {
            memset(keep, 0xFF, sizeof keep);
          }
          if (t.mask) and_bit_mask(t.mask, e, n, keep, head);
          kept = true;
        }
      }
      if (pass->stochastic) {
        Stages::rounding_bits(*pass, PURPOSE_ROUNDING, t.stream, start, len, rounding);
      }
      Stages::template apply<Weight>(*pass, from, dst + e, s + head, masked && pass->n_terms ? keep : nullptr, head,
                                     pass->stochastic ? rounding + head : nullptr, n);
      from = dst + e;
    }
    e += n;
    i += (uint64_t)n;
  }
}

template <class Stages, class Weight>
void perturb_tensor(const Job &job, const zo_tensor &t, int64_t begin, int64_t end) {
  if (!t.rows) return perturb_run<Stages, Weight>(job, t, begin, end, (uint64_t)(t.offset + begin));
  for (int64_t e = begin; e < end;) {
    const int64_t row = e / t.row_len, column = e % t.row_len, stop = smaller(end, (row + 1) * t.row_len);
    perturb_run<Stages, Weight>(job, t, e, stop, (uint64_t)(t.rows[row] * t.row_len + column));
    e = stop;
  }
}

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class Stages> void perturb_range(const Job &job, const zo_tensor &t, int64_t begin, int64_t end) {
  switch (job.dtype) {
  case ZO_F32:
    return perturb_tensor<Stages, float>(job, t, begin, end);
  case ZO_F16:
    return perturb_tensor<Stages, Half>(job, t, begin, end);
  default:
    return perturb_tensor<Stages, Bfloat>(job, t, begin, end);
  }
}

} // namespace
} // namespace zo
#endif
