/* perturb_portable.cpp - the stages of tile.h as loops over noise.h that compilers vectorise, for any processor.
 *
 * A loop runs over calls or over elements, its body is the contract's scalar functions, and no round depends on
 * another: GCC and Clang make SSE2 of it on x86-64 and NEON on AArch64 (tests/kernels/test_portable.py looks at the
 * instructions). What they do not find by themselves is written in vectors: the transpose, and one conversion.
 *
 * Belongs here: loops over the contract's scalar functions. Does not belong here: arithmetic of the contract.
 */
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "mask_tile.h"
#include "update_tile.h"

#if defined(__clang__) /* which would rather unroll the sixteen rounds of a short loop than vectorise it */
#define ZO_VECTORISE _Pragma("clang loop vectorize_width(4) unroll(disable)")
#else
#define ZO_VECTORISE
#endif

namespace zo {
namespace {

struct PortableStages {
  static constexpr int64_t TILE = 2048; /* what 16 Rademacher calls feed; 8 KiB of sums */
  static constexpr bool LEAN = false;   /* its loops are too many for the registers */
  static constexpr int CALLS = 16;      /* side by side: word m of all of them in row m, output a in row a */

  typedef uint32_t Words[4][CALLS];
  typedef float Outputs[16][CALLS];

  /* The words of the calls q, q + STEP, q + 2 STEP, ... */
  template <int STEP>
  static void philox(uint64_t q, uint32_t purpose, uint32_t stream, uint32_t tag, const Keys &keys,
                     Words &__restrict w) {
    uint32_t c0[CALLS], c1[CALLS];
    for (int l = 0; l < CALLS; ++l) {
      const uint64_t call = q + (uint64_t)(STEP * l);
      c0[l] = (uint32_t)call, c1[l] = purpose << 24 | (uint32_t)(call >> 32);
    }
    ZO_VECTORISE for (int l = 0; l < CALLS; ++l) {
      const zo::Words r = philox_keyed(c0[l], c1[l], stream, tag, keys);
      w[0][l] = r.w[0], w[1][l] = r.w[1], w[2][l] = r.w[2], w[3][l] = r.w[3];
    }
  }

  template <int T, bool FIRST> static void accumulate_row(const uint32_t *w, float c, float *s) {
    for (int l = 0; l < CALLS; ++l) {
      const float term = mul_rn(c, f_value(w[l], T, F_BASE));
      s[l] = FIRST ? term : s[l] + term;
    }
  }

  template <bool FIRST> static void accumulate(const Words &w, float c, Outputs &s) {
    for (int m = 0; m < 4; ++m) {
      accumulate_row<0, FIRST>(w[m], c, s[4 * m]);
      accumulate_row<1, FIRST>(w[m], c, s[4 * m + 1]);
      accumulate_row<2, FIRST>(w[m], c, s[4 * m + 2]);
      accumulate_row<3, FIRST>(w[m], c, s[4 * m + 3]);
    }
  }

  static void mix_columns(Outputs &s) {
    ZO_VECTORISE for (int l = 0; l < CALLS; ++l) {
      float x[16];
      for (int a = 0; a < 16; ++a) x[a] = s[a][l];
      mix<1>(x);
      for (int a = 0; a < 16; ++a) s[a][l] = x[a];
    }
  }

#if defined(__GNUC__)
  typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define ZO_PICK(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
  typedef int Places __attribute__((vector_size(16)));
#define ZO_PICK(x, y, i, j, k, l) __builtin_shuffle(x, y, (Places){i, j, k, l})
#endif
  static Four load4(const float *p) {
    Four x;
    memcpy(&x, p, 16);
    return x;
  }
  static void store4(float *p, Four x) { memcpy(p, &x, 16); }

  /* to[32 c + r] = from[r][c] for r, c < 4. */
  static void transpose4(const float (*from)[CALLS], float *to) {
    const Four x0 = load4(from[0]), x1 = load4(from[1]), x2 = load4(from[2]), x3 = load4(from[3]);
    const Four a = ZO_PICK(x0, x1, 0, 4, 1, 5), b = ZO_PICK(x0, x1, 2, 6, 3, 7);
    const Four c = ZO_PICK(x2, x3, 0, 4, 1, 5), d = ZO_PICK(x2, x3, 2, 6, 3, 7);
    store4(to, ZO_PICK(a, c, 0, 1, 4, 5));
    store4(to + 32, ZO_PICK(a, c, 2, 3, 6, 7));
    store4(to + 64, ZO_PICK(b, d, 0, 1, 4, 5));
    store4(to + 96, ZO_PICK(b, d, 2, 3, 6, 7));
  }
#else
  static void transpose4(const float (*from)[CALLS], float *to) {
    for (int r = 0; r < 4; ++r) {
      for (int c = 0; c < 4; ++c) to[32 * c + r] = from[r][c];
    }
  }
#endif

  static void gaussian(const Job &job, const Keys &keys, uint32_t stream, uint64_t start, int64_t len, float *out) {
    for (int64_t p = 0; p < len; p += 32 * CALLS) {
      for (int h = 0; h < 2; ++h) { /* every second call: the elements 32 l + 8 h + (0..7) and 16 behind them */
        const uint64_t q = gaussian_call(start + (uint64_t)p) + (uint64_t)h;
        Words w;
        Outputs s;
        philox<2>(q, PURPOSE_GAUSSIAN, stream, job.terms[0].tag, keys, w);
        accumulate<true>(w, job.terms[0].c, s);
        for (int64_t k = 1; k < job.n_terms; ++k) {
          philox<2>(q, PURPOSE_GAUSSIAN, stream, job.terms[k].tag, keys, w);
          accumulate<false>(w, job.terms[k].c, s);
        }
        mix_columns(s);
        for (int l = 0; l < CALLS; l += 4) {
          float *chunk = out + p + 32 * l + 8 * h;
          for (int a = 0; a < 16; a += 4) transpose4((const float (*)[CALLS]) & s[a][l], chunk + a + (a & 8));
        }
      }
    }
  }

  static void rademacher(const Job &job, const Keys &keys, uint32_t stream, uint64_t start, int64_t len, float *out) {
    uint32_t bit[32];
    for (int j = 0; j < 32; ++j) bit[j] = 1u << j;
    for (int64_t p = 0; p < len; p += 128 * CALLS) {
      for (int64_t k = 0; k < job.n_terms; ++k) {
        Words w;
        philox<1>(rademacher_call(start + (uint64_t)p), PURPOSE_RADEMACHER, stream, job.terms[k].tag, keys, w);
        const uint32_t c = as_bits(job.terms[k].c);
        float *s = out + p;
        for (int l = 0; l < CALLS && p + 128 * l < len; ++l) {
          for (int m = 0; m < 4; ++m, s += 32) {
            const uint32_t x = w[m][l];
            for (int j = 0; j < 32; ++j) { /* rademacher_sign, without a shift of its own for every element */
              const float term = as_float(c ^ (x & bit[j] ? 0x80000000u : 0));
              s[j] = k ? s[j] + term : term;
            }
          }
        }
      }
    }
  }

  static void sum(const Job &job, uint32_t stream, uint64_t start, int64_t len, float *s) {
    const Keys keys = schedule(job.seed);
    job.gaussian ? gaussian(job, keys, stream, start, len, s) : rademacher(job, keys, stream, start, len, s);
  }

  static void random_keep(uint64_t seed, const zo_tensor &t, uint64_t start, int64_t len, uint8_t *keep) {
    const Keys keys = schedule(seed);
    for (int64_t p = 0; p < len; p += 8 * CALLS) {
      Words w;
      philox<1>(octet_call(start + (uint64_t)p), PURPOSE_MASK, t.stream, t.mask_tag, keys, w);
      for (int l = 0; l < CALLS; ++l) {
        const zo::Words call = {{w[0][l], w[1][l], w[2][l], w[3][l]}};
        uint32_t octet = 0;
        for (int j = 0; j < 8; ++j) octet |= zo::random_keep(call, (uint64_t)j, t.keep) ? 1u << j : 0;
        keep[(p >> 3) + l] = (uint8_t)octet;
      }
    }
  }

  static void rounding_bits(const Job &job, uint32_t purpose, uint32_t stream, uint64_t start, int64_t len,
                            uint16_t *v) {
    const Keys keys = schedule(job.seed);
    for (int64_t p = 0; p < len; p += 8 * CALLS) {
      Words w;
      philox<1>(octet_call(start + (uint64_t)p), purpose, stream, job.rounding_tag, keys, w);
      for (int l = 0; l < CALLS; ++l) {
        const zo::Words call = {{w[0][l], w[1][l], w[2][l], w[3][l]}};
        for (int j = 0; j < 8; ++j) v[p + 8 * l + j] = (uint16_t)zo::rounding_bits(call, (uint64_t)j);
      }
    }
  }

  static float load(float x) { return x; }
  static float load(Bfloat x) { return bfloat_to_float(x.bits); }
  static float load(Half x) {
#if defined(__aarch64__)
    __fp16 h;
    memcpy(&h, &x, 2);
    return (float)h;
#else
    return half_to_float(x.bits);
#endif
  }

  static void cast(float *dst, const float *r, int64_t n) { memcpy(dst, r, 4 * (size_t)n); }
  static void cast(Bfloat *dst, const float *r, int64_t n) {
    for (int64_t p = 0; p < n; ++p) dst[p].bits = float_to_bfloat(r[p]);
  }
  static void cast(Half *dst, const float *r, int64_t n) {
    int64_t p = 0;
#if defined(__aarch64__) /* g++ 12 has no vectors for this conversion */
    for (; p + 4 <= n; p += 4) vst1_u16(&dst[p].bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(r + p))));
#endif
    for (; p < n; ++p) dst[p].bits = float_to_half(r[p]);
  }

  static void cast_stochastic(float *dst, float *r, const uint16_t *, int64_t n) { cast(dst, r, n); }
  static void cast_stochastic(Bfloat *dst, float *r, const uint16_t *v, int64_t n) {
    for (int64_t p = 0; p < n; ++p) dst[p].bits = float_to_bfloat_stochastic(r[p], v[p]);
  }
  static void cast_stochastic(Half *dst, float *r, const uint16_t *v, int64_t n) {
    for (int64_t p = 0; p < n; ++p) r[p] = stochastic_half_value(r[p], v[p]);
    cast(dst, r, n);
  }

  /* In two steps, so that no loop reads and writes weights, which may be the same. The decay is 1 if there is none, and
   * a product with 1 is exact. Not inlined, so that passes and rules share it: inlined, g++ for AArch64 unrolled the
   * rests of its loops. */
  template <class Weight>
  __attribute__((noinline)) static void apply(const Job &job, const Weight *src, Weight *dst, float *s,
                                              const uint8_t *keep, int64_t head, const uint16_t *v, int64_t n) {
    const float decay = job.decay;
    if (keep) {
      uint8_t kept[TILE + 8];
      const int64_t skip = head & 7;
      for (int64_t p = 0; p < n + skip; p += 8) {
        for (int j = 0; j < 8; ++j) kept[p + j] = (uint8_t)(keep[(head + p) >> 3] & 1u << j);
      }
      for (int64_t p = 0; p < n; ++p) {
        const float d = mul_rn(load(src[p]), decay), r = d + s[p];
        s[p] = kept[p + skip] ? r : d;
      }
    } else if (job.n_terms) {
      for (int64_t p = 0; p < n; ++p) s[p] = mul_rn(load(src[p]), decay) + s[p];
    } else {
      for (int64_t p = 0; p < n; ++p) s[p] = mul_rn(load(src[p]), decay);
    }
    v ? cast_stochastic(dst, s, v, n) : cast(dst, s, n);
  }
};

/* Of masks by magnitude. */
struct PortableBits {
  /* Bit e of the 64: the magnitude of x[e] is below the limit. Bytes of 0 and 1 in a vectorised loop; the product moves
   * those of an octet side by side into its highest byte. */
  template <class Word> static void below(const Word *x, uint32_t limit, uint8_t *bits) {
    constexpr Word MAGNITUDE = (Word) ~(Word)0 >> 1;
    const Word most = (Word)limit;
    uint8_t kept[64];
    for (int e = 0; e < 64; ++e) kept[e] = (Word)(x[e] & MAGNITUDE) < most;
    for (int k = 0; k < 8; ++k) {
      uint64_t octet;
      memcpy(&octet, kept + 8 * k, 8);
      bits[k] = (uint8_t)((octet * 0x0102040810204080u) >> 56);
    }
  }
};

} // namespace

void perturb_portable(const Job &job, const zo_tensor &tensor, int64_t begin, int64_t end) {
  perturb_range<PortableStages>(job, tensor, begin, end);
}

void update_portable(const UpdateJob &job, const zo_tensor &tensor, const zo_states &states, int64_t begin,
                     int64_t end) {
  update_range<PortableStages>(job, tensor, states, begin, end);
}

void mask_portable(int dtype, uint32_t limit, const zo_tensor &tensor, int64_t begin, int64_t end) {
  mask_range<PortableBits>(dtype, limit, tensor, begin, end);
}

} // namespace zo
