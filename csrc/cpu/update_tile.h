/* update_tile.h - an update rule over a range of one tensor, tile by tile, for every instruction set.
 *
 *   (theta, states) <- rule(decay theta, states, u),  u = scale * sum_k c_k z_k     docs/numerics.md, "Update rules"
 *
 * Per tile of at most Stages::TILE consecutive elements, in L1: the sum as in a pass (tile.h), the weights to fp32, one
 * loop over the elements with the rule's arithmetic, the cast as in a pass. "adam_history" makes the noise of each of
 * its K terms a second time, by itself. Bytes per element: two sizes of the weight, and 8 for each fp32 state. The
 * loops are written for the compiler to vectorise: roots and quotients in vectors, masks as selections.
 *
 * Belongs here: memory access in units of tiles. Does not belong here: the rules (rules.h), noise and casts (noise.h,
 * the stages). Everything has internal linkage, see perturb.h.
 */
#ifndef ZO_CPU_UPDATE_TILE_H
#define ZO_CPU_UPDATE_TILE_H

#include "../rules.h"
#include "tile.h"

namespace zo {
namespace {

inline float widened(float x) { return x; }
inline float widened(Half x) { return half_to_float(x.bits); }
inline float widened(Bfloat x) { return bfloat_to_float(x.bits); }
inline float rounded(float x, uint16_t, float *) { return x; }
inline Bfloat rounded(float x, uint16_t v, Bfloat *) { return Bfloat{float_to_bfloat_stochastic(x, v)}; }

/* What a masked-out element's state keeps, bit for bit: a float would go through a register of floats all the same, and
 * no instruction on the way changes it. */
template <class State> inline State choose(bool kept, State changed, State old) { return kept ? changed : old; }
inline Bfloat choose(bool kept, Bfloat changed, Bfloat old) { return Bfloat{kept ? changed.bits : old.bits}; }

constexpr int BLOCK = 16; /* elements of a turn of the loop: whole vectors of every width, so that it has no rest */

/* x: theta in fp32, becomes the new one before its cast. kept: a byte per element. n: a multiple of BLOCK. */
template <int RULE, class State, bool MASKED>
void rule_loop(const Numbers &given, float *__restrict x, const float *__restrict u, State *__restrict first,
               float *__restrict second, const uint16_t *__restrict dice, const uint8_t *__restrict kept, int64_t n) {
  const Numbers numbers = given;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    for (int64_t p = begin; p < begin + BLOCK; ++p) {
      const float d = mul_rn(numbers.x[1], x[p]);
      float a = 0, b = 0;
      if constexpr (RULE != ZO_ADAM_HISTORY) a = widened(first[p]);
      if constexpr (RULE == ZO_ADAM || RULE == ZO_ADAM_HISTORY) b = second[p];
      [[maybe_unused]] const float old = b;
      const float r = apply_rule<RULE>(numbers, d, add_rn(u[p], 0.0f), a, b); /* u is never -0 */
      const bool keep = !MASKED || kept[p] != 0;
      x[p] = keep ? r : d;
      if constexpr (RULE != ZO_ADAM_HISTORY) {
        first[p] = choose(keep, rounded(a, sizeof(State) == 2 ? dice[p] : (uint16_t)0, (State *)nullptr), first[p]);
      }
      if constexpr (RULE == ZO_ADAM) second[p] = keep ? b : old;
    }
  }
}

/* n elements; x, u, dice and kept may be touched behind them, up to a whole block, and the states may not. */
template <int RULE, class State>
void apply_to_tile(const Numbers &numbers, float *x, const float *u, void *states, float *second, const uint16_t *dice,
                   const uint8_t *kept, int64_t n) {
  State *const first = (State *)states;
  const auto loop = kept ? rule_loop<RULE, State, true> : rule_loop<RULE, State, false>;
  const int64_t whole = n & ~(int64_t)(BLOCK - 1), rest = n - whole;
  loop(numbers, x, u, first, second, dice, kept, whole);
  if (!rest) return;
  constexpr bool HAS_FIRST = RULE != ZO_ADAM_HISTORY, HAS_SECOND = RULE == ZO_ADAM || RULE == ZO_ADAM_HISTORY;
  State last[BLOCK] = {};
  float last_second[BLOCK] = {};
  if (HAS_FIRST) memcpy(last, first + whole, (size_t)rest * sizeof(State));
  if (HAS_SECOND) memcpy(last_second, second + whole, (size_t)rest * sizeof(float));
  loop(numbers, x + whole, u + whole, last, last_second, dice + whole, kept ? kept + whole : nullptr, BLOCK);
  if (HAS_FIRST) memcpy(first + whole, last, (size_t)rest * sizeof(State));
  if (RULE == ZO_ADAM) memcpy(second + whole, last_second, (size_t)rest * sizeof(float));
}

/* Elements e .. end - 1, whose indices are i, i + 1, ... */
template <class Stages, class Weight>
void update_run(const UpdateJob &job, const zo_tensor &t, const zo_states &states, int64_t e, int64_t end) {
  constexpr int64_t SIZE = Stages::TILE + PAD;
  alignas(64) float u[SIZE], x[SIZE], v[SIZE];
  alignas(64) uint16_t dice[SIZE];
  alignas(64) uint8_t keep[SIZE / 8], kept[SIZE];
  alignas(64) Weight nothing[Stages::TILE]; /* -0 + x is x, so that Stages::apply only casts */
  for (int64_t p = 0; p < Stages::TILE; ++p) {
    const uint32_t bits = 0x80000000u >> (32 - 8 * sizeof(Weight));
    memcpy(nothing + p, &bits, sizeof(Weight));
  }
  const bool masked = t.mask || t.keep, narrow = job.state_dtype == ZO_BF16;
  Numbers numbers;
  memcpy(numbers.x, job.numbers, sizeof numbers.x);
  Job cast = job.sum;
  cast.n_terms = 1;
  while (e < end) {
    const uint64_t i = (uint64_t)(t.offset + e), start = i & ~(uint64_t)127; /* where a call of every purpose begins */
    const int64_t head = (int64_t)(i - start);
    const int64_t n = smaller(end - e, Stages::TILE - head), len = head + n;
    const auto sum = [&](const Job &terms) {
      Stages::sum(terms, t.stream, start, len, u);
      if (t.scale) multiply_scales(t, i, n, u + head);
    };
    if (job.rule == ZO_ADAM_HISTORY) {
      for (int64_t p = 0; p < n; ++p) v[p] = 0;
      for (int64_t k = 0; k < job.n_squares; ++k) {
        Job one = job.sum;
        one.terms = job.singles + k;
        one.n_terms = 1;
        sum(one);
        const float q = job.squares[k];
        const float *z = u + head;
        for (int64_t p = 0; p < n; ++p) v[p] = add_rn(v[p], mul_rn(q, mul_rn(z[p], z[p])));
      }
    }
    if (job.sum.n_terms) {
      sum(job.sum);
    } else {
      memset(u, 0, sizeof u);
    }
    if (masked) {
      if (t.keep) {
        Stages::random_keep(job.sum.seed, t, start, len, keep);
      } else {
        memset(keep, 0xFF, sizeof keep);
      }
      if (t.mask) and_bit_mask(t.mask, e, n, keep, head);
      for (int64_t p = 0; p < n; ++p) kept[p] = (uint8_t)(keep[(head + p) >> 3] >> ((head + p) & 7) & 1);
    }
    if (narrow) Stages::rounding_bits(job.sum, PURPOSE_STATE, t.stream, start, len, dice);
    const Weight *src = (const Weight *)t.src + e;
    for (int64_t p = 0; p < n; ++p) x[p] = widened(src[p]);
    void *const first = narrow ? (void *)((Bfloat *)states.first + e) : (void *)((float *)states.first + e);
    const auto apply = [&](auto loop, float *second) {
      loop(numbers, x, u + head, first, second, dice + head, masked ? kept : nullptr, n);
    };
    float *const second = states.second ? states.second + e : nullptr;
    switch (job.rule) {
    case ZO_MOMENTUM:
      apply(narrow ? apply_to_tile<ZO_MOMENTUM, Bfloat> : apply_to_tile<ZO_MOMENTUM, float>, nullptr);
      break;
    case ZO_ADAM:
      apply(narrow ? apply_to_tile<ZO_ADAM, Bfloat> : apply_to_tile<ZO_ADAM, float>, second);
      break;
    case ZO_HIZOO:
      apply(apply_to_tile<ZO_HIZOO, float>, nullptr);
      break;
    default:
      apply(apply_to_tile<ZO_ADAM_HISTORY, float>, v);
    }
    if (cast.stochastic) Stages::rounding_bits(job.sum, PURPOSE_ROUNDING, t.stream, start, len, dice);
    Stages::template apply<Weight>(cast, nothing, (Weight *)t.dst + e, x, nullptr, 0,
                                   cast.stochastic ? dice + head : nullptr, n);
    e += n;
  }
}

template <class Stages>
void update_range(const UpdateJob &job, const zo_tensor &t, const zo_states &states, int64_t begin, int64_t end) {
  switch (job.sum.dtype) {
  case ZO_F32:
    return update_run<Stages, float>(job, t, states, begin, end);
  case ZO_F16:
    return update_run<Stages, Half>(job, t, states, begin, end);
  default:
    return update_run<Stages, Bfloat>(job, t, states, begin, end);
  }
}

} // namespace
} // namespace zo
#endif
