/* perturb_portable.cpp - the stages of tile.h straight from noise.h, one element after the other, for any processor.
 *
 * Belongs here: loops over the contract's scalar functions, as readable as the contract. Does not belong here: anything
 * clever; this is what the vector kernels are compared with where the reference in Python is too slow.
 */
#include "tile.h"

namespace zo {
namespace {

struct ScalarStages {
  static constexpr int64_t TILE = 512; /* a multiple of 128, which a Rademacher call feeds */

  static void sum(const Job &job, uint32_t stream, uint64_t start, int64_t len, float *out) {
    if (job.gaussian) {
      for (int64_t p = 0; p < len; p += 32) {
        for (int h = 0; h < 2; ++h) {
          const uint64_t q = gaussian_call(start + (uint64_t)p) + (uint64_t)h;
          float s[16] = {};
          for (int64_t k = 0; k < job.n_terms; ++k) {
            const Words w = call(q, PURPOSE_GAUSSIAN, stream, job.terms[k].tag, job.seed);
            for (int a = 0; a < 16; ++a) s[a] += mul_rn(job.terms[k].c, f_value(w.w[a >> 2], a & 3, F_BASE));
          }
          mix<1>(s);
          memcpy(out + p + 8 * h, s, 32);
          memcpy(out + p + 16 + 8 * h, s + 8, 32);
        }
      }
    } else {
      for (int64_t p = 0; p < len; p += 128) {
        for (int j = 0; j < 128; ++j) out[p + j] = 0;
        for (int64_t k = 0; k < job.n_terms; ++k) {
          const Words w =
              call(rademacher_call(start + (uint64_t)p), PURPOSE_RADEMACHER, stream, job.terms[k].tag, job.seed);
          const uint32_t c = as_bits(job.terms[k].c);
          for (int j = 0; j < 128; ++j) out[p + j] += as_float(c ^ rademacher_sign(w, (uint64_t)j));
        }
      }
    }
  }

  static void random_keep(uint64_t seed, const zo_tensor &t, uint64_t start, int64_t len, uint8_t *keep) {
    for (int64_t p = 0; p < len; p += 8) {
      const Words w = call(octet_call(start + (uint64_t)p), PURPOSE_MASK, t.stream, t.mask_tag, seed);
      uint8_t octet = 0;
      for (int j = 0; j < 8; ++j) octet |= (uint8_t)(zo::random_keep(w, (uint64_t)j, t.keep) << j);
      keep[p >> 3] = octet;
    }
  }

  static void rounding_bits(const Job &job, uint32_t stream, uint64_t start, int64_t len, uint16_t *v) {
    for (int64_t p = 0; p < len; p += 8) {
      const Words w = call(octet_call(start + (uint64_t)p), PURPOSE_ROUNDING, stream, job.rounding_tag, job.seed);
      for (int j = 0; j < 8; ++j) v[p + j] = (uint16_t)zo::rounding_bits(w, (uint64_t)j);
    }
  }

  static float load(float x) { return x; }
  static float load(Half x) { return half_to_float(x.bits); }
  static float load(Bfloat x) { return bfloat_to_float(x.bits); }

  static void store(float *p, float r, const uint16_t *) { *p = r; }
  static void store(Half *p, float r, const uint16_t *v) {
    p->bits = float_to_half(v ? stochastic_half_value(r, *v) : r);
  }
  static void store(Bfloat *p, float r, const uint16_t *v) {
    p->bits = v ? float_to_bfloat_stochastic(r, *v) : float_to_bfloat(r);
  }

  template <class Weight>
  static void apply(const Job &job, const Weight *src, Weight *dst, const float *s, const uint8_t *keep, int64_t head,
                    const uint16_t *v, int64_t n) {
    for (int64_t p = 0; p < n; ++p) {
      float r = load(src[p]);
      if (job.has_decay) r = mul_rn(r, job.decay);
      const bool kept = keep ? keep[(head + p) >> 3] >> ((head + p) & 7) & 1 : job.n_terms != 0;
      if (kept) r += s[p];
      store(dst + p, r, v ? v + p : nullptr);
    }
  }
};

} // namespace

void perturb_portable(const Job &job, const zo_tensor &tensor, int64_t begin, int64_t end) {
  perturb_range<ScalarStages>(job, tensor, begin, end);
}

} // namespace zo
