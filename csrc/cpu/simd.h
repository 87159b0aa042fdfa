/* simd.h - the stages of tile.h over a vector of Philox calls, written once for every x86 instruction set.
 *
 * A lane is a call: LANES calls run side by side, word m of all of them in one vector, so the contract's 16 outputs are
 * 16 vectors, its mix is 32 vector additions and 32 subtractions without a shuffle, and one 16-row transpose brings the
 * 8-element chunks into memory order. Vector instructions per Gaussian element and term, AVX-512: Philox 0.49 + numbers
 * 0.17; once per element: mix 0.25, transpose 0.25, apply about 0.2.
 *
 * Philox needs 32 x 32 -> 64 bit products, which x86 has for the even 32-bit places only. So a vector of calls is
 * carried as two halves (even calls, odd calls), each word in the low half of a 64-bit place with garbage above it that
 * nothing reads, and merged after the last round. Swapping the places of one full vector in every round costs the same
 * products and more shuffles.
 *
 * A plain pass goes from registers to the weights (lean), which are prefetched two blocks ahead: measured on a Zen 5
 * core with fp32 weights in main memory, this and no more made a pass 1.3 to 1.5 times as fast (AVX-512), in place and
 * out of place. Stores that bypass the caches gained a tenth there, out of place, and lost as much with AVX2: left out.
 *
 * A trait class V supplies LANES, the types U (32-bit integers), F (floats), M (one bit per lane), and the operations
 * used below. Belongs here: the contract in vectors. Does not belong here: intrinsics, memory access in units of
 * tensors.
 */
#ifndef ZO_CPU_SIMD_H
#define ZO_CPU_SIMD_H

#include "tile.h"

namespace zo {
namespace {

template <class V> struct SimdStages {
  using U = typename V::U;
  using F = typename V::F;
  using M = typename V::M;
  static constexpr int LANES = V::LANES;
  static constexpr int64_t TILE = 2048; /* what 16 Rademacher calls feed; 8 KiB of sums */
  static constexpr bool LEAN = true;
  static constexpr int64_t BLOCK = 16 * LANES; /* elements that LANES calls feed */

  /* ---- 1. Philox: the words of the calls q, q + 1, ..., q + LANES - 1 ------------------------------------------- */

  struct Keys {
    U k0[10], k1[10];
    explicit Keys(uint64_t seed) {
      for (int r = 0; r < 10; ++r) {
        k0[r] = V::set1((uint32_t)seed + (uint32_t)r * 0x9E3779B9u);
        k1[r] = V::set1((uint32_t)(seed >> 32) + (uint32_t)r * 0xBB67AE85u);
      }
    }
  };

  static inline void philox(uint64_t q, uint32_t purpose, uint32_t stream, uint32_t tag, const Keys &keys, U *w) {
    const U m0 = V::set1(0xD2511F53u), m1 = V::set1(0xCD9E8D57u);
    U half[2][4];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const U place = V::every_second_call(q + h);
      U c0 = place, c1 = V::bit_or(V::high(place), V::set1(purpose << 24)), c2 = V::set1(stream), c3 = V::set1(tag);
#pragma GCC unroll 10
      for (int r = 0; r < 10; ++r) {
        const U p0 = V::mul_even(m0, c0), p1 = V::mul_even(m1, c2);
        c0 = V::bit_xor3(V::high(p1), c1, keys.k0[r]);
        c1 = p1;
        c2 = V::bit_xor3(V::high(p0), c3, keys.k1[r]);
        c3 = p0;
      }
      half[h][0] = c0, half[h][1] = c1, half[h][2] = c2, half[h][3] = c3;
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) w[m] = V::merge(half[0][m], half[1][m]);
  }

  /* ---- 2. Gaussian ------------------------------------------------------------------------------------------------
   */

  template <bool FIRST> static inline void accumulate(const U *w, float coefficient, F *s) {
    const F c = V::set1f(coefficient);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const F f[4] = {V::number(w[m]), V::number(V::template left<4>(w[m])), V::number(V::template left<11>(w[m])),
                      V::number(V::template left<15>(w[m]))};
      /* c f is exact, so the fused product rounds as the contract does; 0 + c f is c f. */
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) s[4 * m + t] = FIRST ? V::mul(c, f[t]) : V::fma(c, f[t], s[4 * m + t]);
    }
  }

  template <int H> static inline void mix(F *s) {
#pragma GCC unroll 16
    for (int a = 0; a < 16; ++a) {
      if ((a & H) == 0) {
        const F x = s[a], y = s[a + H];
        s[a] = V::add(x, y);
        s[a + H] = V::sub(x, y);
      }
    }
    if constexpr (H < 8) mix<2 * H>(s);
  }

  /* The sums of the 16 LANES elements of the calls q, q + 1, ..., vector by vector: sink(x, at) gets those of LANES
   * consecutive elements, the first of which is element `at` of them. */
  template <class Sink>
  static inline void gaussian_block(const Job &job, uint32_t stream, uint64_t q, const Keys &keys, const Sink &sink) {
    U w[4];
    F s[16];
    philox(q, PURPOSE_GAUSSIAN, stream, job.terms[0].tag, keys, w);
    accumulate<true>(w, job.terms[0].c, s);
    for (int64_t k = 1; k < job.n_terms; ++k) {
      philox(q, PURPOSE_GAUSSIAN, stream, job.terms[k].tag, keys, w);
      accumulate<false>(w, job.terms[k].c, s);
    }
    mix<1>(s);
    V::chunks(s, sink);
  }

  static void gaussian(const Job &job, uint32_t stream, uint64_t start, int64_t len, float *out) {
    const Keys keys(job.seed);
    for (int64_t p = 0; p < len; p += 16 * LANES) { /* 16 elements to a call: q = 2 * (i >> 5) */
      float *const s = out + p;
      gaussian_block(job, stream, (start + (uint64_t)p) >> 4, keys, [s](F x, int at) { V::storef(s + at, x); });
    }
  }

  /* Whole blocks of the commonest pass, Gaussian terms and nothing else, straight from registers to the weights; see
   * tile.h. Returns how many of the n elements, the first of which has index i, it has done. */
  template <class Weight>
  static int64_t lean(const Job &job, const zo_tensor &t, const Weight *src, Weight *dst, int64_t n, uint64_t i) {
    if (n < BLOCK || i % 32 || !job.gaussian || !job.n_terms || job.has_decay || job.stochastic || t.mask || t.keep ||
        t.scale) {
      return 0;
    }
    const Keys keys(job.seed);
    int64_t p = 0;
    for (; p + BLOCK <= n; p += BLOCK) {
      const Weight *const from = src + p;
      Weight *const to = dst + p;
      /* A block's vectors come in an order that hardware does not foresee; behind the end, nothing is fetched. */
      for (uintptr_t c = 2 * BLOCK * sizeof(Weight); c < 3 * BLOCK * sizeof(Weight); c += 64) {
        __builtin_prefetch((const void *)((uintptr_t)from + c), 0);
        __builtin_prefetch((const void *)((uintptr_t)to + c), 1);
      }
      gaussian_block(job, t.stream, (i + (uint64_t)p) >> 4, keys,
                     [=](F x, int at) { store(to + at, V::add(load(from + at), x), nullptr); });
    }
    return p;
  }

  /* ---- 3. Rademacher ----------------------------------------------------------------------------------------------
   */

  static void rademacher(const Job &job, uint32_t stream, uint64_t start, int64_t len, float *out) {
    const Keys keys(job.seed);
    constexpr int64_t FED = 128 * LANES;
    alignas(64) uint32_t signs[4 * LANES + 1] = {}; /* V::mask reads one byte more than it uses */
    U w[4];
    for (int64_t p = 0; p < len; p += FED) {
      const int64_t stop = smaller(len - p, FED);
      for (int64_t k = 0; k < job.n_terms; ++k) {
        philox((start + (uint64_t)p) >> 7, PURPOSE_RADEMACHER, stream, job.terms[k].tag, keys, w);
        V::store_words(w, signs);
        const F c = V::set1f(job.terms[k].c);
        float *s = out + p;
        for (int64_t j = 0; j < stop; j += LANES, s += LANES) {
          const F term = V::negate_if(V::mask((uint8_t *)signs + (j >> 3), 0), c);
          V::storef(s, k ? V::add(V::loadf(s), term) : term);
        }
      }
    }
  }

  static void sum(const Job &job, uint32_t stream, uint64_t start, int64_t len, float *s) {
    job.gaussian ? gaussian(job, stream, start, len, s) : rademacher(job, stream, start, len, s);
  }

  /* ---- 4. Random mask ---------------------------------------------------------------------------------------------
   */

  static void random_keep(uint64_t seed, const zo_tensor &t, uint64_t start, int64_t len, uint8_t *keep) {
    const Keys keys(seed);
    const U threshold = V::set1(t.keep);
    for (int64_t p = 0; p < len; p += 8 * LANES) {
      U w[4], octet = V::set1(0);
      philox((start + (uint64_t)p) >> 3, PURPOSE_MASK, t.stream, t.mask_tag, keys, w);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        octet = V::or_if_below(octet, V::swap_halves(w[m]), threshold, 1u << (2 * m));
        octet = V::or_if_below(octet, w[m], threshold, 2u << (2 * m));
      }
      V::store_low_bytes(octet, keep + (p >> 3));
    }
  }

  /* ---- 5. Casts ---------------------------------------------------------------------------------------------------
   */

  static void rounding_bits(const Job &job, uint32_t purpose, uint32_t stream, uint64_t start, int64_t len,
                            uint16_t *v) {
    const Keys keys(job.seed);
    for (int64_t p = 0; p < len; p += 8 * LANES) {
      U w[4];
      philox((start + (uint64_t)p) >> 3, purpose, stream, job.rounding_tag, keys, w);
      V::store_words(w, (uint32_t *)(v + p)); /* x86 is little-endian: the 16 bits of element i are in place */
    }
  }

  static inline F load(const float *p) { return V::loadf(p); }
  static inline F load(const Half *p) { return V::load_half(p); }
  static inline F load(const Bfloat *p) { return V::as_float(V::template left<16>(V::widen((const uint16_t *)p))); }

  static inline M is_nan(U magnitude) { return V::below(V::set1(0x7F800000u), magnitude); }

  static inline void store(float *p, F r, const uint16_t *) { V::storef(p, r); }

  static inline void store(Half *p, F r, const uint16_t *v) {
    if (v) {
      const U b = V::as_bits(r), a = V::bit_and(b, V::set1(0x7FFFFFFFu)), edge = V::set1(0x38800000u);
      const F pad = V::as_float(V::zero_unless(V::below(a, edge), edge));
      const U dither = V::template right<3>(V::widen(v));
      const U y = V::bit_and(V::plus(V::as_bits(V::add(V::as_float(a), pad)), dither), V::set1(~0x1FFFu));
      const U chosen = V::bit_or(V::as_bits(V::sub(V::as_float(y), pad)), V::bit_and(b, V::set1(0x80000000u)));
      r = V::as_float(V::choose(is_nan(a), b, chosen));
    }
    V::store_half(p, r);
  }

  /* A NaN is left to the truncation, which keeps it one: it came from 16 bits, or is quiet as arithmetic left it. */
  static inline void store(Bfloat *p, F r, const uint16_t *v) {
    const U b = V::as_bits(r), odd = V::bit_and(V::template right<16>(b), V::set1(1));
    const U half = v ? V::widen(v) : V::plus(odd, V::set1(0x7FFFu));
    V::store_narrow((uint16_t *)p, V::template right<16>(V::plus(b, V::zero_unless(V::ordered(r), half))));
  }

  /* ---- apply ------------------------------------------------------------------------------------------------------
   */

  template <class Weight, bool PLAIN>
  static inline void apply_vector(const Job &job, const Weight *src, Weight *dst, const float *s, const uint8_t *keep,
                                  int64_t bit, const uint16_t *v) {
    F r = load(src);
    if constexpr (PLAIN) {
      r = V::add(r, V::loadf(s));
    } else {
      if (job.has_decay) r = V::mul(r, V::set1f(job.decay));
      if (keep) {
        r = V::add_if(V::mask(keep + (bit >> 3), (int)(bit & 7)), r, V::loadf(s));
      } else if (job.n_terms) {
        r = V::add(r, V::loadf(s));
      }
    }
    store(dst, r, PLAIN ? nullptr : v);
  }

  template <class Weight, bool PLAIN>
  static void apply_loop(const Job &job, const Weight *src, Weight *dst, const float *s, const uint8_t *keep,
                         int64_t head, const uint16_t *v, int64_t n) {
    int64_t p = 0;
    for (; p + LANES <= n; p += LANES) {
      apply_vector<Weight, PLAIN>(job, src + p, dst + p, s + p, keep, head + p, v ? v + p : nullptr);
    }
    if (p < n) {
      Weight last[LANES] = {};
      memcpy(last, src + p, (size_t)(n - p) * sizeof(Weight));
      apply_vector<Weight, PLAIN>(job, last, last, s + p, keep, head + p, v ? v + p : nullptr);
      memcpy(dst + p, last, (size_t)(n - p) * sizeof(Weight));
    }
  }

  template <class Weight>
  static void apply(const Job &job, const Weight *src, Weight *dst, const float *s, const uint8_t *keep, int64_t head,
                    const uint16_t *v, int64_t n) {
    if (!job.n_terms || job.has_decay || keep || v) {
      apply_loop<Weight, false>(job, src, dst, s, keep, head, v, n);
    } else {
      apply_loop<Weight, true>(job, src, dst, s, nullptr, head, nullptr, n);
    }
  }
};

} // namespace
} // namespace zo
#endif
