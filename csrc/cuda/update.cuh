/* update.cuh - the CUDA kernel of the update rules (docs/numerics.md, "Update rules").
 *
 *   (theta, states) <- rule(decay theta, states, u),  u = scale * sum_k c_k z_k       over a whole list of tensors
 *
 * Cost: memory traffic of 2 * sizeof(weight) + 8 bytes per element and fp32 state (bf16: 4), so 12 for momentum and 20
 * for Adam on 16-bit weights. Instructions per element: those of a pass (perturb.cuh) and 4 to 40 for the rule, whose
 * quotients and roots are IEEE's. "adam_history" mixes and squares each term by itself: about 14 for each (docs/benchmarks.md has the counts).
 *
 * Belongs here: device code only, which also compiles as host C++, as perturb.cuh, whose geometry, noise, masks and
 * memory accesses it has. Does not belong here: launches (update.cu), the rules (rules.h).
 */
#ifndef ZO_CUDA_UPDATE_CUH
#define ZO_CUDA_UPDATE_CUH

#include "../rules.h"
#include "perturb.cuh"

namespace zo {
namespace cuda {

struct UpdateLaunch {
  zo_update update;
  Keys keys;     /* of the seed */
  uint32_t base; /* as in Launch */
  int64_t tile;
  const zo_tensor *table;
  const zo_states *states;
  const uint2 *map;
};

/* The terms into shared memory and the numbers into `numbers`; returns whether the pass is to be made, and in `live`
 * whether any term is. Ends with a barrier. */
template <int RULE> ZO_DEVICE bool stage_rule(const zo_update &update, Term *terms, Numbers &numbers, bool &live) {
  const zo_pass &pass = update.pass;
  bool bad = false;
  live = false;
  for (int64_t k = threadIdx.x; k < pass.n_terms; k += THREADS) {
    const Term t = pass.kind == ZO_GAUSSIAN ? make_term<ZO_GAUSSIAN>(pass, k) : make_term<ZO_RADEMACHER>(pass, k);
    live |= t.c != 0.0f;
    if (k < STAGE) terms[k] = t;
    bad |= !is_finite(pass.tags ? pass.coefs[k] : pass.inline_coefs[k]);
    if constexpr (RULE == ZO_ADAM_HISTORY) {
      bad |= !is_finite(update.squares ? update.squares[k] : update.inline_squares[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < ZO_RULE_NUMBERS; ++k) {
    if (k < count_of_numbers(RULE)) {
      numbers.x[k] = update.number_ptr ? update.number_ptr[k] : update.numbers[k];
      bad |= !is_finite(numbers.x[k]);
    }
  }
  bad |= numbers.x[0] == 0.0f;
  live = opaque(__syncthreads_or(live)) != 0;
  return opaque(__syncthreads_or(bad)) == 0;
}

/* s = sum_k c_k z_k and v = sum_k q_k y_k^2 of the group of call q, where y_k = scaled(z_k). */
template <int KIND, class Scaled>
ZO_DEVICE void sums_of_history(float *s, float *v, const zo_update &update, const Term *terms, uint64_t q,
                               uint32_t stream, const Keys &keys, uint32_t base, Scaled scaled) {
  const zo_pass &pass = update.pass;
#pragma unroll
  for (int a = 0; a < 16; ++a) s[a] = v[a] = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < pass.n_terms; ++k) {
    const Term t = k < STAGE ? terms[k] : make_term<KIND>(pass, k);
    const float square = update.squares ? update.squares[k] : update.inline_squares[k];
    float y[16];
    /* The same call of Philox, which the compiler makes once. */
    add_term<KIND, false>(s, t, q, stream, keys, base);
    add_term<KIND, true>(y, Term{t.tag, KIND == ZO_GAUSSIAN ? gaussian_coefficient(1.0f) : 1.0f}, q, stream, keys,
                         base);
    if constexpr (KIND == ZO_GAUSSIAN) mix<1>(y);
    scaled(y);
#pragma unroll
    for (int a = 0; a < 16; ++a) v[a] = add_rn(v[a], mul_rn(square, mul_rn(y[a], y[a])));
  }
  if constexpr (KIND == ZO_GAUSSIAN) mix<1>(s);
}

/* theta (packed in w) and the states (first, second) of group q to their new values. Bit a of keep: output a is not
 * masked out. S: the type of the first state. Of "adam_history", `second` is v. */
template <class T, int RULE, class S>
ZO_DEVICE void apply_to_group(uint32_t *w, uint32_t *first, uint32_t *second, const float *u, const Numbers &numbers,
                              uint32_t keep, bool stochastic, uint64_t q, uint32_t stream, uint32_t tag,
                              const Keys &keys) {
  constexpr bool NARROW = sizeof(typename S::element) == 2;
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    Words dice = {}, lots = {};
    if (stochastic) dice = call_keyed(octet_of(q, chunk), PURPOSE_ROUNDING, stream, tag, keys);
    if constexpr (NARROW) lots = call_keyed(octet_of(q, chunk), PURPOSE_STATE, stream, tag, keys);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int pair = 4 * chunk + k;
      float x[2], a[2] = {}, b[2] = {};
      T::get(w, pair, x[0], x[1]);
      if constexpr (RULE != ZO_ADAM_HISTORY) S::get(first, pair, a[0], a[1]);
      if constexpr (RULE == ZO_ADAM || RULE == ZO_ADAM_HISTORY) F32::get(second, pair, b[0], b[1]);
      uint32_t kept = 0; /* the halves of a packed pair */
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool here = keep >> (2 * pair + j) & 1u;
        const float old = a[j], old_second = b[j], d = mul_rn(numbers.x[1], x[j]);
        const float r = apply_rule<RULE>(numbers, d, add_rn(u[2 * pair + j], 0.0f), a[j], b[j]); /* u is never -0 */
        x[j] = here ? r : d;
        if constexpr (!NARROW) a[j] = here ? a[j] : old;
        b[j] = here ? b[j] : old_second;
        if (here) kept |= 0xFFFFu << (16 * j);
      }
      if constexpr (NARROW) {
        uint32_t changed[8];
        S::put_stochastic(changed, pair, a[0], a[1], lots.w[k]);
        first[pair] = (changed[pair] & kept) | (first[pair] & ~kept);
      } else if constexpr (RULE != ZO_ADAM_HISTORY) {
        F32::put(first, pair, a[0], a[1]);
      }
      if constexpr (RULE == ZO_ADAM) F32::put(second, pair, b[0], b[1]);
      if (stochastic)
        T::put_stochastic(w, pair, x[0], x[1], dice.w[k]);
      else
        T::put(w, pair, x[0], x[1]);
    }
  }
}

/* store_whole(), spelled out: of three arrays' stores nvcc took one of each apart into 32-bit ones. */
template <class T> ZO_DEVICE void store_group(const uint32_t *w, typename T::element *p) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int k = 0; k < T::WORDS / 4; ++k) {
    const int chunk = k / (T::WORDS / 8), part = k % (T::WORDS / 8);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p + 16 * chunk + part * (16 / sizeof(*p)))), "r"(w[4 * k]),
                   "r"(w[4 * k + 1]), "r"(w[4 * k + 2]), "r"(w[4 * k + 3])
                 : "memory");
  }
#else
  store_whole<T>(w, p);
#endif
}

/* One tile. `first` and `second` of the thread's group stand where theta does in the kernel of perturb.cuh. */
template <class T, int RULE, class S> ZO_DEVICE void update_tile(const UpdateLaunch &launch, Shared &shared) {
  using element = typename T::element;
  using state = typename S::element;
  constexpr bool HAS_FIRST = RULE != ZO_ADAM_HISTORY, HAS_SECOND = RULE == ZO_ADAM;
  const zo_update &update = launch.update;
  const zo_pass &pass = update.pass;
  const uint2 where = launch.map[blockIdx.x];
  const zo_tensor *t = launch.table + where.x;
  element *theta = global(static_cast<element *>(t->dst));
  state *first = nullptr;
  uint32_t *second = nullptr;
  if constexpr (HAS_FIRST) first = global(static_cast<state *>(launch.states[where.x].first));
  if constexpr (HAS_SECOND) second = global(reinterpret_cast<uint32_t *>(launch.states[where.x].second));
  const int64_t numel = t->numel, offset = t->offset;
  const uint32_t stream = t->stream;

  Numbers numbers;
  bool live;
  if (threadIdx.x == 0) shared.base = launch.base; /* stage_rule() ends with a barrier */
  if (!stage_rule<RULE>(update, shared.terms, numbers, live)) return;
  const uint32_t base = shared.base;
  const uint32_t staged = opaque(pass.n_terms < STAGE ? (uint32_t)pass.n_terms : STAGE);
  Keys keys;
#pragma unroll
  for (int k = 0; k < 20; ++k) keys.k[k] = opaque(launch.keys.k[k]);
  const bool stochastic = pass.rounding == ZO_STOCHASTIC && sizeof(element) == 2;
  const uint32_t tag = pass.n_terms ? term_tag(pass, 0) : 0;
  const uint8_t *mask = t->mask;
  const float *scale = nullptr;
  if (t->scale) scale = t->scale - divide((uint64_t)offset, (uint64_t)t->scale_block);

  const int64_t start = (int64_t)where.y * launch.tile - (offset & 31);
  const int64_t length = numel - start < launch.tile ? numel - start : launch.tile;
  if (length <= 0) return;
  const uint32_t spans = (uint32_t)((length + SPAN - 1) / SPAN);
  uintptr_t places_of_all = reinterpret_cast<uintptr_t>(theta);
  if constexpr (HAS_FIRST) places_of_all |= reinterpret_cast<uintptr_t>(first);
  if constexpr (HAS_SECOND) places_of_all |= reinterpret_cast<uintptr_t>(second);
  const bool aligned = (places_of_all & 15u) == 0 && offset % 8 == 0;
  const uint32_t skip = start < 0, full = aligned ? (uint32_t)(length / SPAN) : 0;

  int64_t e = start + (threadIdx.x >> 1) * 32 + (threadIdx.x & 1) * 8; /* the thread's first element */
  uint64_t q = (uint64_t)(offset + start) / 16 + threadIdx.x;          /* its call */
  for (uint32_t span = 0; span < spans; ++span, q += SPAN / 16, e += SPAN) {
    const bool whole = span >= skip && span < full;
    const Places inside = places(e, numel);
    uint32_t w[T::WORDS], a[S::WORDS], b[16];
    const auto load = [&] {
      if (whole) {
        load_whole<T>(w, theta + e);
        if constexpr (HAS_FIRST) load_whole<S>(a, first + e);
        if constexpr (HAS_SECOND) load_whole<F32>(b, second + e);
      } else {
        load_part<T>(w, theta + e, inside);
        if constexpr (HAS_FIRST) load_part<S>(a, first + e, inside);
        if constexpr (HAS_SECOND) load_part<F32>(b, second + e, inside);
      }
    };
    /* In flight while the noise is computed; but the loop over a history's terms has no registers to spare. */
    if constexpr (RULE != ZO_ADAM_HISTORY) load();
    float u[16];
    const auto scaled = [&](float *sum) {
      if (scale) {
        apply_scale(sum, global(scale), (uint64_t)t->scale_block, (q >> 1) * 32 + (q & 1) * 8, inside,
                    [](float x) { return x; });
      }
    };
    if constexpr (RULE == ZO_ADAM_HISTORY) {
      float v[16];
      if (pass.kind == ZO_GAUSSIAN)
        sums_of_history<ZO_GAUSSIAN>(u, v, update, shared.terms, q, stream, keys, base, scaled);
      else
        sums_of_history<ZO_RADEMACHER>(u, v, update, shared.terms, q, stream, keys, base, scaled);
#pragma unroll
      for (int k = 0; k < 16; ++k) b[k] = as_bits(v[k]);
      load();
    } else if (!live) {
#pragma unroll
      for (int k = 0; k < 16; ++k) u[k] = 0.0f;
    } else if (pass.kind == ZO_GAUSSIAN) {
      noise<ZO_GAUSSIAN>(u, pass, shared.terms, staged, q, stream, keys, base);
    } else {
      noise<ZO_RADEMACHER>(u, pass, shared.terms, staged, q, stream, keys, base);
    }
    if (live) scaled(u); /* u = 0 whatever the scale, if there is none */
    uint32_t keep = 0xFFFFu;
    if (mask) keep = bit_mask(global(mask), e, inside);
    if (t->keep) keep &= random_mask(q, t->keep, t->mask_tag, stream, keys);
    apply_to_group<T, RULE, S>(w, a, b, u, numbers, keep, stochastic, q, stream, tag, keys);
    if (whole) {
      store_group<T>(w, theta + e);
      if constexpr (HAS_FIRST) store_group<S>(a, first + e);
      if constexpr (HAS_SECOND) store_group<F32>(b, second + e);
    } else {
      store_part<T>(w, theta + e, inside);
      if constexpr (HAS_FIRST) store_part<S>(a, first + e, inside);
      if constexpr (HAS_SECOND) store_part<F32>(b, second + e, inside);
    }
  }
}

/* ---- which kernel ------------------------------------------------------------------------------------------------ */

template <class T_, int RULE_, class S_> struct UpdateVariant {
  using T = T_;
  using S = S_;
  static constexpr int RULE = RULE_;
};

template <class T, class F> int with_rule(const zo_update &update, F f) {
  const bool narrow = update.state_dtype == ZO_BF16;
  switch (update.rule) {
  case ZO_MOMENTUM:
    return narrow ? f(UpdateVariant<T, ZO_MOMENTUM, BF16>{}) : f(UpdateVariant<T, ZO_MOMENTUM, F32>{});
  case ZO_ADAM:
    return narrow ? f(UpdateVariant<T, ZO_ADAM, BF16>{}) : f(UpdateVariant<T, ZO_ADAM, F32>{});
  case ZO_HIZOO:
    return f(UpdateVariant<T, ZO_HIZOO, F32>{});
  default:
    return f(UpdateVariant<T, ZO_ADAM_HISTORY, F32>{});
  }
}

/* f(UpdateVariant{}) for the kernel that serves this pass. */
template <class F> int dispatch_rule(const zo_update &update, F f) {
  if (update.pass.dtype == ZO_F32) return with_rule<F32>(update, f);
  if (update.pass.dtype == ZO_F16) return with_rule<F16>(update, f);
  return with_rule<BF16>(update, f);
}

} // namespace cuda
} // namespace zo
#endif
