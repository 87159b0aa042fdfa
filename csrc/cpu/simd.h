/* simd.h - the stages of tile.h over a vector of Philox calls, written once for every x86 instruction set.
 *
 * A lane is a call: LANES calls run side by side, word m of all of them in one vector, so the contract's 16 outputs are
 * 16 vectors, and its mix is 32 vector additions and 32 subtractions without a shuffle. Then one transpose brings the
 * 8-element chunks into memory order. bf16 weights come and go as pairs in 32-bit places, the even and the odd ones of
 * 16 in a vector each: no place is widened or narrowed, and a third of the transpose's shuffles falls away. The bits of
 * stochastic rounding are words of Philox as they stand, and the calls are given to lanes so that the first half of the
 * same transpose puts each beside its weight: they never go through memory.
 *
 * Philox needs 32 x 32 -> 64 bit products, which x86 has for the even 32-bit places only. So a vector of calls is
 * carried as two halves (even calls, odd calls), each word in the low half of a 64-bit place with garbage above it that
 * nothing reads, and merged after the last round. Swapping the places of one full vector in every round costs the same
 * products and more shuffles.
 *
 * A pass without masks and scales goes from registers to the weights (lean), which are prefetched 2 KiB ahead, two
 * blocks of fp32 with AVX-512: measured on a Zen 5 core with fp32 weights in main memory, this and no more made a pass
 * 1.3 to 1.5 times as fast, in place and out of place. Stores that bypass the caches gained a tenth there, out of
 * place, and lost as much with AVX2: left out.
 *
 * A trait class V supplies LANES, the types U (32-bit integers), F (floats), M (one bit per lane), and the operations
 * used below. Belongs here: the contract in vectors. Does not belong here: intrinsics, memory access in units of
 * tensors.
 */
#ifndef ZO_CPU_SIMD_H
#define ZO_CPU_SIMD_H

#include "tile.h"

#define ZO_ALWAYS __attribute__((always_inline))
#define ZO_INLINE inline ZO_ALWAYS

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
  static constexpr uintptr_t AHEAD = 2048;     /* bytes that lean prefetches ahead */

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

  static constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;

  static ZO_INLINE void philox_round(U *c, const Keys &keys, int r) {
    const U p0 = V::mul_even(V::set1(M0), c[0]), p1 = V::mul_even(V::set1(M1), c[2]);
    c[0] = V::bit_xor3(V::high(p1), c[1], keys.k0[r]), c[1] = p1;
    c[2] = V::bit_xor3(V::high(p0), c[3], keys.k1[r]), c[3] = p0;
  }

  /* Rounds FIRST, ..., END - 1 of N halves, side by side. */
  template <int FIRST, int END, int N> static ZO_INLINE void rounds(U (*c)[4], const Keys &keys) {
#pragma GCC unroll 10
    for (int r = FIRST; r < END; ++r) {
#pragma GCC unroll 4
      for (int h = 0; h < N; ++h) philox_round(c[h], keys, r);
    }
  }

  static ZO_INLINE void merge_halves(const U (*c)[4], U *w) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) w[m] = V::merge(c[0][m], c[1][m]);
  }

  static inline void philox(uint64_t q, uint32_t purpose, uint32_t stream, uint32_t tag, const Keys &keys, U *w) {
    U c[2][4];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const U place = V::every_second_call(q + h);
      c[h][0] = place, c[h][1] = V::bit_or(V::high(place), V::set1(purpose << 24));
      c[h][2] = V::set1(stream), c[h][3] = V::set1(tag);
    }
    rounds<0, 10, 2>(c, keys);
    merge_halves(c, w);
  }

  /* ---- 2. Gaussian ------------------------------------------------------------------------------------------------
   */

  /* Which LANES calls run side by side, from q on: calls(q, 0) are those of the even lanes, calls(q, 1) of the odd
   * ones, and all of them lie below q + SPAN. */
  struct Gaussian {
    static constexpr uint32_t PURPOSE = PURPOSE_GAUSSIAN;
    static constexpr int SPAN = LANES;
    static ZO_INLINE U calls(uint64_t q, int half) { return V::gaussian_calls(q, half); }
  };
  struct Rounding {
    static constexpr uint32_t PURPOSE = PURPOSE_ROUNDING;
    static constexpr int SPAN = 2 * LANES;
    static ZO_INLINE U calls(uint64_t q, int half) { return V::rounding_calls(q, half); }
  };

  /* The words of LANES calls of one stream and one purpose; q ascends. Of the counter only q and the tag differ from
   * block to block: what the first three rounds make of the rest of it is made once for all q with the same high word,
   * which saves an eighth of the rounds.
   *
   * Every round waits for the one before it. In two parts, `begin` and `end`, with other work of a block between and
   * behind them, words are ready when they are wanted: it took a seventh off fp32 passes in cache on a Zen 3 core. */
  template <class Which> struct Calls {
    static constexpr int PART = 7; /* rounds of `begin` */
    const Keys &keys;
    const U stream;
    uint64_t until = 0; /* x0, x2 and x3 serve further calls that end there or before */
    U x0[2], x2[2], x3[2];
    U c[2][4];

    Calls(const Keys &keys, uint32_t stream) : keys(keys), stream(V::set1(stream)) {}

    void renew(uint64_t q) {
      const U p1 = V::mul_even(V::set1(M1), stream);
      for (int h = 0; h < 2; ++h) {
        const U c1 = V::bit_or(V::high(Which::calls(q, h)), V::set1(Which::PURPOSE << 24));
        const U p0 = V::mul_even(V::set1(M0), V::bit_xor3(V::high(p1), c1, keys.k0[0]));
        x0[h] = V::bit_xor(p1, keys.k0[1]);
        x2[h] = V::bit_xor(V::high(p0), keys.k1[1]);
        x3[h] = V::bit_xor(p0, keys.k1[2]);
      }
      until = (q | 0xFFFFFFFFu) + 1; /* calls that reach across it each have their own, and the next ones begin anew */
    }

    /* The first three rounds of the even calls (c[0]) and the odd ones (c[1]). */
    ZO_INLINE void first(uint64_t q, uint32_t tag, U (*c)[4]) {
      if (__builtin_expect(q + Which::SPAN > until, 0)) renew(q);
      const U m0 = V::set1(M0), m1 = V::set1(M1), c3 = V::bit_xor(V::set1(tag), keys.k1[0]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const U p0 = V::mul_even(m0, Which::calls(q, h)), p1 = V::mul_even(m1, V::bit_xor(V::high(p0), c3));
        const U q0 = V::mul_even(m0, V::bit_xor(V::high(p1), x0[h])), q1 = V::mul_even(m1, V::bit_xor(p0, x2[h]));
        c[h][0] = V::bit_xor3(V::high(q1), p1, keys.k0[2]), c[h][1] = q1;
        c[h][2] = V::bit_xor(V::high(q0), x3[h]), c[h][3] = q0;
      }
    }

    ZO_INLINE void begin(uint64_t q, uint32_t tag) {
      first(q, tag, c);
      rounds<3, PART, 2>(c, keys);
    }

    ZO_INLINE void end(U *w) {
      rounds<PART, 10, 2>(c, keys);
      merge_halves(c, w);
    }
  };

  /* f[4m + T] of the calls. */
  template <int T> static ZO_INLINE F number(U w) {
    return V::number(T == 0 ? w : V::template left<T == 1 ? 4 : T == 2 ? 11 : 15>(w));
  }

  /* The stages H, 2 H, ..., LAST of the mix, over 2 LAST outputs. */
  template <int H, int LAST> static ZO_INLINE void mix(F *s) {
#pragma GCC unroll 16
    for (int a = 0; a < 2 * LAST; ++a) {
      if ((a & H) == 0) {
        const F x = s[a], y = s[a + H];
        s[a] = V::add(x, y);
        s[a + H] = V::sub(x, y);
      }
    }
    if constexpr (H < LAST) mix<2 * H, LAST>(s);
  }

  /* A single term up to the second stage of the mix, word by word, which keeps its outputs in registers. c f is exact,
   * so that a fused product rounds as the contract does: half of the products go into the first stage. */
  static ZO_INLINE void one_term(const U *w, F c, F *s) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const F f0 = number<0>(w[m]), f2 = number<2>(w[m]);
      const F y = V::mul(c, number<1>(w[m])), v = V::mul(c, number<3>(w[m]));
      F *const x = s + 4 * m;
      x[0] = V::fma(c, f0, y), x[1] = V::fms(c, f0, y);
      x[2] = V::fma(c, f2, v), x[3] = V::fms(c, f2, v);
      mix<2, 2>(x);
    }
  }

  template <bool FIRST> static ZO_INLINE void accumulate(const U *w, F c, F *s) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const F f[4] = {number<0>(w[m]), number<1>(w[m]), number<2>(w[m]), number<3>(w[m])};
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) s[4 * m + t] = FIRST ? V::mul(c, f[t]) : V::fma(c, f[t], s[4 * m + t]);
    }
  }

  /* The sums of n elements, in blocks of what LANES calls feed, from the call q on: put(p, s) gets those of the block
   * of element p, output a of all calls in s[a]. */
  template <class Put>
  static ZO_INLINE void gaussian_blocks(const Job &job, const Keys &keys, uint32_t stream, uint64_t q, int64_t n,
                                        const Put &put) {
    Calls<Gaussian> calls(keys, stream);
    U w[4];
    F s[16];
    /* With the words of the next term or block; behind the last one nobody reads them. */
    const Term *const terms = job.terms, *const last = terms + job.n_terms - 1;
    const F c = V::set1f(last->c);
    calls.begin(q, terms->tag);
    calls.end(w);
    if (terms == last) {
      for (int64_t p = 0; p < n; p += BLOCK) {
        one_term(w, c, s);
        calls.begin(q += LANES, terms->tag);
        mix<4, 8>(s);
        calls.end(w);
        put(p, s);
      }
      return;
    }
    for (int64_t p = 0; p < n; p += BLOCK) {
      calls.begin(q, terms[1].tag);
      accumulate<true>(w, V::set1f(terms->c), s);
      calls.end(w);
      for (const Term *term = terms + 1; term < last; ++term) {
        calls.begin(q, term[1].tag);
        accumulate<false>(w, V::set1f(term->c), s);
        calls.end(w);
      }
      calls.begin(q += LANES, terms->tag);
      accumulate<false>(w, c, s);
      mix<1, 8>(s);
      calls.end(w);
      put(p, s);
    }
  }

  static void gaussian(const Job &job, uint32_t stream, uint64_t start, int64_t len, float *out) {
    const Keys keys(job.seed);
    /* 16 elements to a call: q = 2 * (i >> 5) */
    gaussian_blocks(job, keys, stream, start >> 4, len, [out](int64_t p, const F *s) ZO_ALWAYS {
      float *const to = out + p;
      V::chunks(s, [to](F x, F y, int at) ZO_ALWAYS { V::storef(to + at, x), V::storef(to + at + V::APART, y); });
    });
  }

  /* Whole blocks of the commonest passes, Gaussian terms and nothing else but a decay and any cast, straight from
   * registers to the weights; see tile.h. Returns how many of the n elements, the first of which has index i, it has
   * done. */
  template <class Weight>
  static int64_t lean(const Job &job, const zo_tensor &t, const Weight *src, Weight *dst, int64_t n, uint64_t i) {
    if (n < BLOCK || i % 32 || !job.gaussian || !job.n_terms || t.mask || t.keep || t.scale) return 0;
    n -= n % BLOCK;
    if (sizeof(Weight) == 2 && job.stochastic) {
      lean_blocks<Weight, true, sizeof(Weight) == 2>(job, t, src, dst, n, i);
    } else if (job.has_decay) {
      lean_blocks<Weight, true, false>(job, t, src, dst, n, i);
    } else {
      lean_blocks<Weight, false, false>(job, t, src, dst, n, i);
    }
    return n;
  }

  /* DECAY: multiplies by the decay, which is 1 where there is none. */
  template <class Weight, bool DECAY, bool STOCHASTIC>
  static void lean_blocks(const Job &job, const zo_tensor &t, const Weight *src, Weight *dst, int64_t n, uint64_t i) {
    const Keys keys(job.seed);
    Calls<Rounding> rounding(keys, t.stream);
    const uint32_t rounding_tag = job.rounding_tag;
    const F decay = V::set1f(job.decay);
    gaussian_blocks(job, keys, t.stream, i >> 4, n, [=, &rounding](int64_t p, const F *s) ZO_ALWAYS {
      /* A block's vectors come in an order that hardware does not foresee; behind the end, nothing is fetched. */
      for (uintptr_t c = AHEAD; c < AHEAD + BLOCK * sizeof(Weight); c += 64) {
        __builtin_prefetch((const void *)((uintptr_t)(src + p) + c), 0);
        __builtin_prefetch((const void *)((uintptr_t)(dst + p) + c), 1);
      }
      U v[8];
      if constexpr (STOCHASTIC) rounding_block(rounding, (i + (uint64_t)p) >> 3, rounding_tag, v);
      add_block<DECAY, STOCHASTIC>(s, src + p, dst + p, decay, v);
    });
  }

  /* The 16 bits of a block's elements: v[at / 16] those of the elements that V::chunks and V::pairs sink at `at`. */
  static ZO_INLINE void rounding_block(Calls<Rounding> &calls, uint64_t q, uint32_t tag, U *v) {
    U c[4][4];
    calls.first(q, tag, c), calls.first(q + 2, tag, c + 2);
    rounds<3, 10, 4>(c, calls.keys);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      U w[4];
      merge_halves(c + 2 * half, w);
      const F x[4] = {V::as_float(w[0]), V::as_float(w[1]), V::as_float(w[2]), V::as_float(w[3])};
      F y[4];
      V::transpose_places(x, y);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) v[2 * g + half] = V::as_bits(y[g]);
    }
  }

  template <bool DECAY> static ZO_INLINE F decayed(F x, F decay) { return DECAY ? V::mul(x, decay) : x; }

  template <bool DECAY, bool STOCHASTIC, class Weight>
  static ZO_INLINE void add_block(const F *s, const Weight *from, Weight *to, F decay, const U *v) {
    V::chunks(s, [=](F x, F y, int at) ZO_ALWAYS {
      x = V::add(decayed<DECAY>(load(from + at), decay), x);
      y = V::add(decayed<DECAY>(load(from + at + V::APART), decay), y);
      if constexpr (STOCHASTIC) {
        const U dither = V::template right16<3>(v[at >> 4]);
        x = dithered(x, V::widen_low(dither)), y = dithered(y, V::widen_high(dither));
      }
      store(to + at, x, nullptr), store(to + at + V::APART, y, nullptr);
    });
  }

  template <bool DECAY, bool STOCHASTIC>
  static ZO_INLINE void add_block(const F *s, const Bfloat *from, Bfloat *to, F decay, const U *v) {
    V::pairs(s, [=](F even, F odd, int at) ZO_ALWAYS {
      const U w = V::load_pairs((const uint16_t *)from + at);
      const F low = V::as_float(V::template left<16>(w)), high = V::as_float(V::bit_and(w, V::set1(0xFFFF0000u)));
      const U x = V::as_bits(V::add(decayed<DECAY>(low, decay), even));
      const U y = V::as_bits(V::add(decayed<DECAY>(high, decay), odd));
      V::store_pairs((uint16_t *)to + at, STOCHASTIC ? stochastic_pairs(x, y, v[at >> 4]) : V::nearest_pairs(x, y));
    });
  }

  /* Both to bf16, as pairs. A NaN needs no care, since its low half is 0 and nothing carries: it came from 16 bits, or
   * arithmetic made it. */
  static ZO_INLINE U stochastic_pairs(U even, U odd, U v) {
    return V::high_halves(V::plus(even, V::bit_and(v, V::set1(0xFFFFu))), V::plus(odd, V::template right<16>(v)));
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
      const U b = V::as_bits(r), chosen = V::as_bits(dithered(r, V::template right<3>(V::widen(v))));
      r = V::as_float(V::choose(is_nan(V::bit_and(b, V::set1(0x7FFFFFFFu))), b, chosen));
    }
    V::store_half(p, r);
  }

  /* What the stochastic cast to fp16 chooses, by the upper 13 of its 16 bits. A NaN whose low 13 bits are 0 stays one:
   * any that came from 16 bits, or that arithmetic made. */
  static ZO_INLINE F dithered(F r, U dither) {
    const U b = V::as_bits(r), a = V::bit_and(b, V::set1(0x7FFFFFFFu)), edge = V::set1(0x38800000u);
    const F pad = V::as_float(V::zero_unless(V::below(a, edge), edge));
    const U y = V::bit_and(V::plus(V::as_bits(V::add(V::as_float(a), pad)), dither), V::set1(~0x1FFFu));
    return V::as_float(V::with_sign_of(b, V::as_bits(V::sub(V::as_float(y), pad))));
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
