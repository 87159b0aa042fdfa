/* perturb_avx512.cpp - the vector operations of simd.h in AVX-512 F, BW, DQ, VL: 16 calls at a time.
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

struct Avx512 {
  using U = __m512i;
  using F = __m512;
  using M = __mmask16;
  static constexpr int LANES = 16;
  static constexpr int APART = 128; /* elements from the lower to the upper half of what `chunks` and `pairs` sink */

  static inline U set1(uint32_t x) { return _mm512_set1_epi32((int)x); }
  static inline F set1f(float x) { return _mm512_set1_ps(x); }
  static inline F as_float(U x) { return _mm512_castsi512_ps(x); }
  static inline U as_bits(F x) { return _mm512_castps_si512(x); }

  /* q, q + 2, ..., q + 14 as 64-bit integers. */
  static inline U every_second_call(uint64_t q) {
    return _mm512_add_epi64(_mm512_set1_epi64((long long)q), _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
  }
  /* The same of calls for Gaussian noise: lane 8 k + 4 h + g, when `merge` has put both halves together, is the call
   * q + 8 k + 2 g + h, which feeds the elements 128 k + 32 g + 8 h + (0..7) and 16 behind them. */
  static inline U gaussian_calls(uint64_t q, int half) {
    return _mm512_add_epi64(_mm512_set1_epi64((long long)q + 2 * half), _mm512_set_epi64(13, 9, 12, 8, 5, 1, 4, 0));
  }
  /* Lane 4 L + g of calls for stochastic rounding: those of the elements in place L of the vector g of `pairs`. */
  static inline U rounding_calls(uint64_t q, int half) {
    return _mm512_add_epi64(_mm512_set1_epi64((long long)q + 4 * half), _mm512_set_epi64(25, 17, 24, 16, 9, 1, 8, 0));
  }
  static inline U mul_even(U x, U y) { return _mm512_mul_epu32(x, y); }
  static inline U high(U x) { return _mm512_srli_epi64(x, 32); }
  static inline U merge(U even, U odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0); }
  static inline U bit_xor(U x, U y) { return _mm512_xor_si512(x, y); }
  static inline U bit_xor3(U x, U y, U z) { return _mm512_ternarylogic_epi32(x, y, z, 0x96); }
  static inline U bit_or(U x, U y) { return _mm512_or_si512(x, y); }
  static inline U bit_and(U x, U y) { return _mm512_and_si512(x, y); }
  static inline U plus(U x, U y) { return _mm512_add_epi32(x, y); }
  template <int N> static inline U left(U x) { return _mm512_slli_epi32(x, N); }
  template <int N> static inline U right(U x) { return _mm512_srli_epi32(x, N); }
  static inline U swap_halves(U x) { return _mm512_rol_epi32(x, 16); }

  static inline F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static inline F add(F x, F y) { return _mm512_add_ps(x, y); }
  static inline F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static inline F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static inline F fms(F x, F y, F z) { return _mm512_fmsub_ps(x, y, z); }
  static inline F number(U w) { /* (w & F_MASK) | F_BASE */
    return as_float(_mm512_ternarylogic_epi32(w, set1(F_MASK), set1(F_BASE), 0xEA));
  }

  static inline U with_sign_of(U x, U magnitude) {
    return _mm512_ternarylogic_epi32(magnitude, x, set1(0x80000000u), 0xF8);
  }

  /* Lane l is bit `shift` + l of the bytes at p; reads three bytes. */
  static inline M mask(const uint8_t *p, int shift) {
    uint16_t low;
    memcpy(&low, p, 2);
    return (M)((low | (uint32_t)p[2] << 16) >> shift);
  }
  static inline M below(U x, U y) { return _mm512_cmplt_epi32_mask(x, y); }
  static inline M ordered(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q); }
  static inline U zero_unless(M m, U x) { return _mm512_maskz_mov_epi32(m, x); }
  static inline U choose(M m, U x, U y) { return _mm512_mask_mov_epi32(y, m, x); }
  static inline F add_if(M m, F x, F y) { return _mm512_mask_add_ps(x, m, x, y); }
  static inline F negate_if(M m, F x) { return _mm512_mask_xor_ps(x, m, x, set1f(-0.0f)); }
  static inline U or_if_below(U acc, U x, U y, uint32_t bit) {
    return _mm512_mask_or_epi32(acc, _mm512_cmplt_epu32_mask(x, y), acc, set1(bit));
  }

  static inline F loadf(const float *p) { return _mm512_loadu_ps(p); }
  static inline void storef(float *p, F x) { _mm512_storeu_ps(p, x); }
  static inline F load_half(const Half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
  static inline void store_half(Half *p, F x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline U widen(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
  static inline void store_narrow(uint16_t *p, U x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x)); }
  /* Pairs of neighbours, of which the upper half lies APART elements further. */
  static inline U load_pairs(const uint16_t *p) {
    const U low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i *)(p + APART)), 1);
  }
  static inline void store_pairs(uint16_t *p, U x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_castsi512_si256(x));
    _mm256_storeu_si256((__m256i *)(p + APART), _mm512_extracti64x4_epi64(x, 1));
  }
  static inline U swapped_halves() { return _mm512_set4_epi32(0x0D0C0F0E, 0x09080B0A, 0x05040706, 0x01000302); }
  static inline U high_halves(U x, U y) {
    return _mm512_mask_shuffle_epi8(y, 0x3333333333333333u, x, swapped_halves());
  }
  static inline U low_halves(U x, U y) {
    return _mm512_mask_shuffle_epi8(x, 0xCCCCCCCCCCCCCCCCu, y, swapped_halves());
  }
  static inline U nearest_pairs(U even, U odd) { /* up if low >= 0x8000 | (~high & 1) */
    const U high = high_halves(even, odd), low = low_halves(even, odd), one = set1(0x00010001u);
    const U least = _mm512_ternarylogic_epi32(high, one, set1(0x80008000u), 0xAE);
    return _mm512_mask_add_epi16(high, _mm512_cmpge_epu16_mask(low, least), high, one);
  }
  template <int N> static inline U right16(U x) { return _mm512_srli_epi16(x, N); }
  static inline U widen_low(U x) { return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)); }
  static inline U widen_high(U x) { return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)); }
  static inline void store_low_bytes(U x, uint8_t *p) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x)); }

  /* Four vectors, 128-bit place L of vector m holding row 4L + m of a 4 x 4 block: the 4 x 4 transpose in every place.
   */
  static inline void transpose_places(const F *x, F *y) {
    const F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
    const F c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
    y[0] = pd(_mm512_unpacklo_pd(pd(a), pd(c))), y[1] = pd(_mm512_unpackhi_pd(pd(a), pd(c)));
    y[2] = pd(_mm512_unpacklo_pd(pd(b), pd(d))), y[3] = pd(_mm512_unpackhi_pd(pd(b), pd(d)));
  }
  static inline __m512d pd(F x) { return _mm512_castps_pd(x); }
  static inline F pd(__m512d x) { return _mm512_castpd_ps(x); }

  /* Sinks the 128-bit places 0 of a, b, c, d one behind the other at `at`, the places 1 at `at` + stride, and so on. */
  template <class Sink> static inline void by_place(F a, F b, F c, F d, int at, int stride, const Sink &sink) {
    const F ab02 = _mm512_shuffle_f32x4(a, b, 0x88),
            ab13 = _mm512_shuffle_f32x4(a, b, 0xDD); /* a0 a2 b0 b2, a1 a3 b1 b3 */
    const F cd02 = _mm512_shuffle_f32x4(c, d, 0x88), cd13 = _mm512_shuffle_f32x4(c, d, 0xDD);
    sink(_mm512_shuffle_f32x4(ab02, cd02, 0x88), at);
    sink(_mm512_shuffle_f32x4(ab13, cd13, 0x88), at + stride);
    sink(_mm512_shuffle_f32x4(ab02, cd02, 0xDD), at + 2 * stride);
    sink(_mm512_shuffle_f32x4(ab13, cd13, 0xDD), at + 3 * stride);
  }

  /* s[a] holds output a of 16 calls in the order of gaussian_calls; sink(x, y, at) gets 16 elements from `at` on and 16
   * more, APART further. */
  template <class Sink> static ZO_INLINE void chunks(const F *s, const Sink &sink) {
    const U lower = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), upper = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, s += 8) {
      F low[4], high[4]; /* low[g], place 2 k + h: outputs 0..3 of this half of the call 8 k + 2 g + h */
      transpose_places(s, low);
      transpose_places(s + 4, high);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        sink(pd(_mm512_permutex2var_pd(pd(low[g]), lower, pd(high[g]))),
             pd(_mm512_permutex2var_pd(pd(low[g]), upper, pd(high[g]))), 32 * g + 16 * half);
      }
    }
  }

  /* sink(x, y, at) gets the even and the odd ones of these 32: two thirds of the shuffles of `chunks`. */
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
    const __m512i most = _mm512_set1_epi32((int)limit), magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    for (int k = 0; k < 4; ++k) {
      const __m512i word = _mm512_and_si512(_mm512_loadu_si512(x + 16 * k), magnitude);
      const __mmask16 mask = _mm512_cmplt_epu32_mask(word, most);
      memcpy(bits + 2 * k, &mask, 2);
    }
  }
  static inline void below(const uint16_t *x, uint32_t limit, uint8_t *bits) {
    const __m512i most = _mm512_set1_epi16((short)limit), magnitude = _mm512_set1_epi16(0x7FFF);
    for (int k = 0; k < 2; ++k) {
      const __m512i word = _mm512_and_si512(_mm512_loadu_si512(x + 32 * k), magnitude);
      const __mmask32 mask = _mm512_cmplt_epu16_mask(word, most);
      memcpy(bits + 4 * k, &mask, 4);
    }
  }

  /* The words of call 0, then those of call 1, ... */
  static inline void store_words(const U *w, uint32_t *p) {
    const F x[4] = {as_float(w[0]), as_float(w[1]), as_float(w[2]), as_float(w[3])};
    F t[4]; /* t[c], place L: the words of call 4L + c */
    transpose_places(x, t);
    by_place(t[0], t[1], t[2], t[3], 0, 16, [p](F y, int at) { storef((float *)p + at, y); });
  }
};

} // namespace

void perturb_avx512(const Job &job, const zo_tensor &tensor, int64_t begin, int64_t end) {
  perturb_range<SimdStages<Avx512>>(job, tensor, begin, end);
}

void update_avx512(const UpdateJob &job, const zo_tensor &tensor, const zo_states &states, int64_t begin, int64_t end) {
  update_range<SimdStages<Avx512>>(job, tensor, states, begin, end);
}

void mask_avx512(int dtype, uint32_t limit, const zo_tensor &tensor, int64_t begin, int64_t end) {
  mask_range<Avx512>(dtype, limit, tensor, begin, end);
}

} // namespace zo
#endif
