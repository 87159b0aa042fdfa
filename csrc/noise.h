/* noise.h - the noise contract (docs/numerics.md), for host and device, scalar.
 *
 * Belongs here: the pure functions of the contract, in the order of its sections. Does not belong here: memory access,
 * loops over tensors, vector intrinsics, torch, Python. The portable CPU kernel and the CUDA kernel are built on it,
 * and the vector kernels are tested against it.
 *
 * Compile with -ffp-contract=off (host) / use of the _rn intrinsics below (device): the products of section 4 round
 * by themselves.
 */
#ifndef ZO_NOISE_H
#define ZO_NOISE_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ZO_HD __host__ __device__ __forceinline__
#else
#define ZO_HD static inline
#endif

#ifdef __cplusplus
namespace zo {
#endif

enum { PURPOSE_GAUSSIAN = 0, PURPOSE_RADEMACHER = 1, PURPOSE_ROUNDING = 2, PURPOSE_MASK = 3, PURPOSE_STATE = 4 };

ZO_HD float as_float(uint32_t b) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(b);
#else
  float f;
  memcpy(&f, &b, 4);
  return f;
#endif
}

ZO_HD uint32_t as_bits(float f) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(f);
#else
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
#endif
}

/* A product that must not be contracted with the addition that follows it. */
ZO_HD float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

/* ---- 1. Philox4x32-10 ------------------------------------------------------------------------------------------- */

struct Words {
  uint32_t w[4];
};

/* The full 64-bit product. On the device by name: nvcc turns the C expression into a product of two 64-bit numbers, and
 * ptxas then adds a zero high word, one instruction for each of the 20 products. */
ZO_HD uint64_t mul_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t p;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return (uint64_t)a * b;
#endif
}

/* The round keys k0, k1 of the ten rounds. */
struct Keys {
  uint32_t k[20];
};

ZO_HD Keys schedule(uint64_t seed) {
  Keys keys;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    keys.k[2 * round] = (uint32_t)seed + 0x9E3779B9u * (uint32_t)round;
    keys.k[2 * round + 1] = (uint32_t)(seed >> 32) + 0xBB67AE85u * (uint32_t)round;
  }
  return keys;
}

ZO_HD Words philox_keyed(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const Keys &keys) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = mul_wide(0xD2511F53u, c0);
    const uint64_t p1 = mul_wide(0xCD9E8D57u, c2);
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ keys.k[2 * round];
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ keys.k[2 * round + 1];
    c3 = (uint32_t)p0;
  }
  Words r;
  r.w[0] = c0;
  r.w[1] = c1;
  r.w[2] = c2;
  r.w[3] = c3;
  return r;
}

ZO_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  return philox_keyed(c0, c1, c2, c3, schedule(seed));
}

ZO_HD Words call(uint64_t q, uint32_t purpose, uint32_t stream, uint32_t tag, uint64_t seed) {
  return philox((uint32_t)q, purpose << 24 | (uint32_t)(q >> 32), stream, tag, seed);
}

ZO_HD Words call_keyed(uint64_t q, uint32_t purpose, uint32_t stream, uint32_t tag, const Keys &keys) {
  return philox_keyed((uint32_t)q, purpose << 24 | (uint32_t)(q >> 32), stream, tag, keys);
}

/* ---- 2. Gaussian ------------------------------------------------------------------------------------------------ */

static const uint32_t F_MASK = 0x82C20000u, F_BASE = 0x3C240000u;

ZO_HD uint64_t gaussian_call(uint64_t i) { return 2 * (i >> 5) + ((i >> 3) & 1); }
ZO_HD int gaussian_output(uint64_t i) { return (int)(8 * ((i >> 4) & 1) + (i & 7)); }

/* f[4m+t]; base is F_BASE, passed in so that a device kernel can hold it in a register the compiler cannot see through
 * (with a literal, (w & imm) | imm becomes two LOP3). */
ZO_HD float f_value(uint32_t w, int t, uint32_t base) {
  const int shift = t == 0 ? 0 : t == 1 ? 4 : t == 2 ? 11 : 15;
  return as_float(((w << shift) & F_MASK) | base);
}

/* t rounded to 17 significant bits; 0 if the term is not live. */
ZO_HD float live_or_zero(float t, uint32_t rounded) {
  const bool live = (as_bits(t) & 0x7FFFFFFFu) >= 0x0D800000u /* 2^-100 */ && (rounded & 0x7F800000u) != 0x7F800000u;
  return live ? as_float(rounded) : 0.0f;
}

ZO_HD float gaussian_coefficient(float c) {
  const float t = mul_rn(c, as_float(0x3F928FDFu));
  const uint32_t b = as_bits(t);
  return live_or_zero(t, (b + 0x3Fu + ((b >> 7) & 1u)) & 0xFFFFFF80u);
}

/* The mix, in place. Template recursion: nvcc does not unroll `for (h = 1; h < 16; h *= 2)`, and a run-time index would
 * send s to local memory. */
#ifdef __cplusplus
template <int H> ZO_HD void mix(float *s) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int a = 0; a < 16; ++a) {
    if ((a & H) == 0) {
      const float x = s[a], y = s[a + H];
      s[a] = x + y;
      s[a + H] = x - y;
    }
  }
  if constexpr (H < 8) mix<2 * H>(s);
}
#endif

/* ---- 3. Rademacher ---------------------------------------------------------------------------------------------- */

ZO_HD uint64_t rademacher_call(uint64_t i) { return i >> 7; }
ZO_HD float rademacher_coefficient(float c) { return live_or_zero(c, as_bits(c)); }
ZO_HD uint32_t rademacher_sign(const Words &w, uint64_t i) { /* 0 or 0x80000000, to be xored into c's bits */
  return ((w.w[(i >> 5) & 3] >> (i & 31)) & 1u) << 31;
}

/* ---- 4. Random mask --------------------------------------------------------------------------------------------- */

ZO_HD uint64_t octet_call(uint64_t i) { return i >> 3; } /* purposes 2 to 4: one call feeds 8 elements */

ZO_HD bool random_keep(const Words &w, uint64_t i, uint32_t threshold) {
  uint32_t x = w.w[(i & 7) >> 1];
  if ((i & 1) == 0) x = x << 16 | x >> 16;
  return x < threshold;
}

/* RN(1 / RN(sqrt(x))), for an inverse-square-root scale. */
ZO_HD float inverse_root(float x) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(1.0f, __fsqrt_rn(x));
#else
  return 1.0f / __builtin_sqrtf(x);
#endif
}

/* ---- 5. Casts --------------------------------------------------------------------------------------------------- */

ZO_HD uint32_t rounding_bits(const Words &w, uint64_t i) { return (w.w[(i & 7) >> 1] >> (16 * (i & 1))) & 0xFFFFu; }

ZO_HD float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, mag = h & 0x7FFFu;
  /* Shift the 15 magnitude bits into fp32's place and rescale the exponent by 2^112; exact, subnormals included. */
  if (mag >= 0x7C00u) return as_float(sign | 0x7F800000u | (mag & 0x3FFu) << 13);
  return as_float(sign | as_bits(as_float(mag << 13) * as_float(0x77800000u)));
}

ZO_HD uint16_t float_to_half(float f) {
  const uint32_t b = as_bits(f), sign = b >> 16 & 0x8000u, a = b & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
  if (a >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* 65520 and above: infinity */
  if (a < 0x38800000u) {                                   /* subnormal: let the fp32 adder round at 2^-24 */
    return (uint16_t)(sign | (as_bits(as_float(a) + 0.5f) - 0x3F000000u));
  }
  return (uint16_t)(sign | ((a - 0x38000000u + 0xFFFu + (a >> 13 & 1u)) >> 13));
}

ZO_HD float bfloat_to_float(uint16_t h) { return as_float((uint32_t)h << 16); }

ZO_HD uint16_t float_to_bfloat(float f) {
  const uint32_t b = as_bits(f);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(b >> 16 | 0x40u);
  return (uint16_t)((b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
}

ZO_HD uint16_t float_to_bfloat_stochastic(float r, uint32_t v) {
  const uint32_t b = as_bits(r), sign = b >> 16 & 0x8000u, a = b & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return float_to_bfloat(r);
  return (uint16_t)(sign | (a + v) >> 16);
}

/* The fp32 value, itself representable in fp16 (or beyond its range), that the stochastic cast chooses. */
ZO_HD float stochastic_half_value(float r, uint32_t v) {
  const uint32_t b = as_bits(r), sign = b & 0x80000000u, a = b & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return r;
  const float pad = a < 0x38800000u ? as_float(0x38800000u) : 0.0f;
  const uint32_t y = (as_bits(as_float(a) + pad) + (v >> 3)) & ~0x1FFFu;
  return as_float(sign | as_bits(as_float(y) - pad));
}

#ifdef __cplusplus
} /* namespace zo */
#endif
#endif
