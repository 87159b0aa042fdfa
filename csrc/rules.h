/* rules.h - the update rules (docs/numerics.md, "Update rules") for one element, for host and device, scalar.
 *
 *   momentum      b <- beta b + u;                         theta <- d - lr b
 *   adam          m <- b1 m + o1 u; v <- b2 v + o2 u u;    theta <- d - lr1 m / (sqrt(f v) + eps)
 *   hizoo         h <- clamp(h + h a (k z z - 1));         theta <- d - lrg z / sqrt(h)
 *   adam_history                                           theta <- d - lr m / (sqrt(v) + eps)
 *
 * where d = decay theta. Cost in fp32 operations: 4, 13 (a root and a quotient among them), 11, 5.
 *
 * Belongs here: the arithmetic of a rule in fp32, each operation rounded to nearest by itself. Does not belong here:
 * noise (noise.h), casts of weights and states, masks, memory.
 */
#ifndef ZO_RULES_H
#define ZO_RULES_H

#include "noise.h"
#include "zo_kernels.h"

#ifndef __CUDA_ARCH__
#include <math.h>
#endif

namespace zo {

ZO_HD float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ZO_HD float sub_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

ZO_HD float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

ZO_HD float sqrt_rn(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

/* The numbers of a rule in their order (zo_kernels.h): [0] is go, [1] the decay. */
struct Numbers {
  float x[ZO_RULE_NUMBERS];
};

ZO_HD int count_of_numbers(int rule) {
  return rule == ZO_MOMENTUM ? 4 : rule == ZO_ADAM ? 9 : rule == ZO_HIZOO ? 7 : 4;
}

ZO_HD int count_of_states(int rule) { return rule == ZO_ADAM ? 2 : rule == ZO_ADAM_HISTORY ? 0 : 1; }

ZO_HD bool is_finite(float x) { return (as_bits(x) & 0x7F800000u) != 0x7F800000u; }

/* The new theta, before its cast; the states become their new values. `d` is RN(decay theta). Of ZO_ADAM_HISTORY
 * `u` is m and `second` is v, which stays. */
template <int RULE> ZO_HD float apply_rule(const Numbers &n, float d, float u, float &first, float &second) {
  if constexpr (RULE == ZO_MOMENTUM) {
    first = add_rn(mul_rn(n.x[3], first), u);
    return sub_rn(d, mul_rn(n.x[2], first));
  } else if constexpr (RULE == ZO_ADAM) {
    first = add_rn(mul_rn(n.x[3], first), mul_rn(n.x[4], u));
    second = add_rn(mul_rn(n.x[5], second), mul_rn(n.x[6], mul_rn(u, u)));
    const float root = sqrt_rn(mul_rn(n.x[7], second));
    return sub_rn(d, div_rn(mul_rn(n.x[2], first), add_rn(root, n.x[8])));
  } else if constexpr (RULE == ZO_HIZOO) {
    const float change = mul_rn(n.x[3], sub_rn(mul_rn(n.x[4], mul_rn(u, u)), 1.0f));
    const float h = add_rn(first, mul_rn(first, change));
    first = h < n.x[5] ? n.x[5] : h > n.x[6] ? n.x[6] : h; /* a NaN stays one */
    return sub_rn(d, div_rn(mul_rn(n.x[2], u), sqrt_rn(first)));
  } else {
    return sub_rn(d, div_rn(mul_rn(n.x[2], u), add_rn(sqrt_rn(second), n.x[3])));
  }
}

} // namespace zo
#endif
