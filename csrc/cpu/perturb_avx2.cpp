/* perturb_avx2.cpp - the vector operations of simd.h in AVX2, FMA and F16C: 8 calls at a time.
 *
 * Belongs here: intrinsics. Does not belong here: the contract (simd.h), a check of the processor (perturb.cpp).
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "mask_tile.h"
#include "simd.h"
#include "update_tile.h"

namespace zo {
namespace {

struct Avx2 {
  using U = __m256i;
  using F = __m256;
  using M = __m256i; /* all ones or zero in every lane */
  static constexpr int LANES = 8;
  static constexpr int APART = 8; /* elements from the lower to the upper half of what `chunks` and `pairs` sink */

  static inline U set1(uint32_t x) { return _mm256_set1_epi32((int)x); }
  static inline F set1f(float x) { return _mm256_set1_ps(x); }
  static inline F as_float(U x) { return _mm256_castsi256_ps(x); }
  static inline U as_bits(F x) { return _mm256_castps_si256(x); }

  /* q, q + 2, q + 4, q + 6 as 64-bit integers. */
  static inline U every_second_call(uint64_t q) {
    return _mm256_add_epi64(_mm256_set1_epi64x((long long)q), _mm256_set_epi64x(6, 4, 2, 0));
  }
  /* The same of calls for Gaussian noise: lane 4 h + g, when `merge` has put both halves together, is the call
   * q + 2 g + h, which feeds the elements 32 g + 8 h + (0..7) and 16 behind them. */
  static inline U gaussian_calls(uint64_t q, int half) {
    return _mm256_add_epi64(_mm256_set1_epi64x((long long)q + 2 * half), _mm256_set_epi64x(5, 1, 4, 0));
  }
  /* Lane 4 L + g of calls for stochastic rounding: those of the elements in place L of the vector g of `pairs`. */
  static inline U rounding_calls(uint64_t q, int half) {
    return _mm256_add_epi64(_mm256_set1_epi64x((long long)q + 4 * half), _mm256_set_epi64x(9, 1, 8, 0));
  }
  static inline U mul_even(U x, U y) { return _mm256_mul_epu32(x, y); }
  static inline U high(U x) { return _mm256_srli_epi64(x, 32); }
  static inline U merge(U even, U odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
  static inline U bit_xor(U x, U y) { return _mm256_xor_si256(x, y); }
  static inline U bit_xor3(U x, U y, U z) { return _mm256_xor_si256(x, _mm256_xor_si256(y, z)); }
  static inline U bit_or(U x, U y) { return _mm256_or_si256(x, y); }
  static inline U bit_and(U x, U y) { return _mm256_and_si256(x, y); }
  static inline U plus(U x, U y) { return _mm256_add_epi32(x, y); }
  template <int N> static inline U left(U x) { return _mm256_slli_epi32(x, N); }
  template <int N> static inline U right(U x) { return _mm256_srli_epi32(x, N); }
  static inline U swap_halves(U x) { return _mm256_or_si256(left<16>(x), right<16>(x)); }

  static inline F mul(F x, F y) { return _mm256_mul_ps(x, y); }
  static inline F add(F x, F y) { return _mm256_add_ps(x, y); }
  static inline F sub(F x, F y) { return _mm256_sub_ps(x, y); }
  static inline F fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }
  static inline F fms(F x, F y, F z) { return _mm256_fmsub_ps(x, y, z); }
  static inline F number(U w) { return as_float(bit_or(bit_and(w, set1(F_MASK)), set1(F_BASE))); }

  static inline U with_sign_of(U x, U magnitude) { return bit_or(magnitude, bit_and(x, set1(0x80000000u))); }

  /* Lane l is bit `shift` + l of the bytes at p; reads two bytes. */
  static inline M mask(const uint8_t *p, int shift) {
    const U bits = set1((uint32_t)(p[0] | p[1] << 8) >> shift);
    return _mm256_srai_epi32(_mm256_sllv_epi32(bits, _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31)), 31);
  }
  static inline M below(U x, U y) { return _mm256_cmpgt_epi32(y, x); }
  static inline M ordered(F x) { return as_bits(_mm256_cmp_ps(x, x, _CMP_ORD_Q)); }
  static inline U zero_unless(M m, U x) { return bit_and(m, x); }
  static inline U choose(M m, U x, U y) { return _mm256_blendv_epi8(y, x, m); }
  static inline F add_if(M m, F x, F y) { return _mm256_blendv_ps(x, add(x, y), as_float(m)); }
  static inline F negate_if(M m, F x) { return as_float(_mm256_xor_si256(as_bits(x), bit_and(m, set1(0x80000000u)))); }
  static inline U or_if_below(U acc, U x, U y, uint32_t bit) { /* unsigned x < y: not max(x, y) == x */
    return bit_or(acc, _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_max_epu32(x, y), x), set1(bit)));
  }

  static inline F loadf(const float *p) { return _mm256_loadu_ps(p); }
  static inline void storef(float *p, F x) { _mm256_storeu_ps(p, x); }
  static inline F load_half(const Half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
  static inline void store_half(Half *p, F x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline U widen(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
  static inline __m128i narrow(U x) { /* every lane below 2^16 */
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
  }
  static inline void store_narrow(uint16_t *p, U x) { _mm_storeu_si128((__m128i *)p, narrow(x)); }
  /* Pairs of neighbours. */
  static inline U load_pairs(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
  static inline void store_pairs(uint16_t *p, U x) { _mm256_storeu_si256((__m256i *)p, x); }
  static inline U high_halves(U x, U y) { return _mm256_blend_epi16(right<16>(x), y, 0xAA); }
  static inline U low_halves(U x, U y) { return _mm256_blend_epi16(x, left<16>(y), 0xAA); }
  static inline U nearest_pairs(U even, U odd) { /* up if low + 0x7FFF + (high & 1) carries: the top of an average */
    const U high = high_halves(even, odd), low = low_halves(even, odd);
    const U below = bit_or(bit_and(high, set1(0x00010001u)), set1(0x7FFE7FFEu));
    return _mm256_add_epi16(high, _mm256_srli_epi16(_mm256_avg_epu16(low, below), 15));
  }
  template <int N> static inline U right16(U x) { return _mm256_srli_epi16(x, N); }
  static inline U widen_low(U x) { return _mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)); }
  static inline U widen_high(U x) { return _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)); }
  static inline void store_low_bytes(U x, uint8_t *p) {
    const __m128i words = narrow(x);
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
  }

  static inline __m256d pd(F x) { return _mm256_castps_pd(x); }
  static inline F pd(__m256d x) { return _mm256_castpd_ps(x); }

  /* Four vectors, 128-bit place L of vector m holding row 4L + m of a 4 x 4 block: the 4 x 4 transpose in every place.
   */
  static inline void transpose_places(const F *x, F *y) {
    const F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
    const F c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
    y[0] = pd(_mm256_unpacklo_pd(pd(a), pd(c))), y[1] = pd(_mm256_unpackhi_pd(pd(a), pd(c)));
    y[2] = pd(_mm256_unpacklo_pd(pd(b), pd(d))), y[3] = pd(_mm256_unpackhi_pd(pd(b), pd(d)));
  }

  /* The 128-bit places 0 of a and b, and the places 1. */
  static inline F places_0(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x20); }
  static inline F places_1(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x31); }

  /* s[a] holds output a of 8 calls in the order of gaussian_calls; sink(x, y, at) gets 8 elements from `at` on and 8
   * more, APART further. */
  template <class Sink> static ZO_INLINE void chunks(const F *s, const Sink &sink) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, s += 8) {
      F low[4], high[4]; /* low[g], place h: outputs 0..3 of this half of the call 2 g + h */
      transpose_places(s, low);
      transpose_places(s + 4, high);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        sink(places_0(low[g], high[g]), places_1(low[g], high[g]), 32 * g + 16 * half);
      }
    }
  }

  /* sink(x, y, at) gets the even and the odd ones of these 16: two thirds of the shuffles of `chunks`. */
  template <class Sink> static ZO_INLINE void pairs(const F *s, const Sink &sink) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, s += 8) {
      const F x[4] = {s[0], s[2], s[4], s[6]}, y[4] = {s[1], s[3], s[5], s[7]};
      F even[4], odd[4];
      transpose_places(x, even);
      transpose_places(y, odd);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) sink(even[g], odd[g], 32 * g + 16 * half);
    }
  }

  /* Bit e of the 64: the magnitude of x[e] is below the limit. */
  static inline void below(const uint32_t *x, uint32_t limit, uint8_t *bits) {
    const U most = set1(limit), magnitude = set1(0x7FFFFFFFu);
    for (int k = 0; k < 8; ++k) {
      bits[k] = (uint8_t)_mm256_movemask_ps(
          as_float(below(bit_and(_mm256_loadu_si256((const __m256i *)(x + 8 * k)), magnitude), most)));
    }
  }
  static inline void below(const uint16_t *x, uint32_t limit, uint8_t *bits) {
    const U most = _mm256_set1_epi16((short)limit), magnitude = _mm256_set1_epi16(0x7FFF);
    for (int k = 0; k < 2; ++k) {
      const U low = _mm256_cmpgt_epi16(most, bit_and(load_pairs(x + 32 * k), magnitude));
      const U high = _mm256_cmpgt_epi16(most, bit_and(load_pairs(x + 32 * k + 16), magnitude));
      const int mask = _mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8));
      memcpy(bits + 4 * k, &mask, 4);
    }
  }

  /* The words of call 0, then those of call 1, ... */
  static inline void store_words(const U *w, uint32_t *p) {
    const F x[4] = {as_float(w[0]), as_float(w[1]), as_float(w[2]), as_float(w[3])};
    F t[4]; /* t[c], place L: the words of call 4L + c */
    transpose_places(x, t);
    float *const to = (float *)p;
    storef(to, places_0(t[0], t[1])), storef(to + 8, places_0(t[2], t[3]));
    storef(to + 16, places_1(t[0], t[1])), storef(to + 24, places_1(t[2], t[3]));
  }
};

} // namespace

void perturb_avx2(const Job &job, const zo_tensor &tensor, int64_t begin, int64_t end) {
  perturb_range<SimdStages<Avx2>>(job, tensor, begin, end);
}

void update_avx2(const UpdateJob &job, const zo_tensor &tensor, const zo_states &states, int64_t begin, int64_t end) {
  update_range<SimdStages<Avx2>>(job, tensor, states, begin, end);
}

void mask_avx2(int dtype, uint32_t limit, const zo_tensor &tensor, int64_t begin, int64_t end) {
  mask_range<Avx2>(dtype, limit, tensor, begin, end);
}

} // namespace zo
#endif
