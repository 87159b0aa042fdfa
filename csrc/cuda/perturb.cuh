/* perturb.cuh - the CUDA kernel of the contract (docs/numerics.md).
 *
 *   dst_i <- cast(decay * src_i + scale * mask_i * sum_k c_k z(seed, stream, tag_k, i))    over a whole list of tensors
 *
 * Cost: 2 * sizeof(weight) bytes of memory traffic per element. Instructions per element on 16-bit weights: 13.6 for
 * one Gaussian term, 5.2 for each further one, 15 more for stochastic rounding. A sequence of passes, each rounded
 * while the weights stay in registers, has the same traffic and takes 11.9 for each pass of one term. A low-rank
 * direction takes 16 and 2.75 for each rank (benchmarks/sass.py prints all of them, tests/kernels/test_cuda_host.py
 * asserts bounds).
 *
 * Belongs here: device code only. It also compiles as host C++ (tests/kernels/cuda_host.cpp provides threadIdx and the
 * barriers), so nothing here may need a header of the CUDA toolkit. Does not belong here: launches (perturb.cu), the
 * contract's formulas (noise.h).
 *
 * Geometry. A block works on one tile of one tensor, named by an entry of the work map. A thread works on groups: the
 * 16 elements of one Gaussian call, two chunks of 8 that lie 16 elements apart, so that with 16-bit weights two
 * neighbouring threads fill whole 32-byte sectors in each of the two 16-byte accesses. Tiles start at multiples of 32
 * of the index i, not of the local element e; therefore the first group of a shard may be partly outside it.
 */
#ifndef ZO_CUDA_PERTURB_CUH
#define ZO_CUDA_PERTURB_CUH

#include "../noise.h"
#include "../zo_kernels.h"

#ifdef __CUDACC__
#define ZO_DEVICE __device__ __forceinline__
#define ZO_MEMBER __device__ __forceinline__
#else
#define ZO_DEVICE static inline
#define ZO_MEMBER inline
#endif

namespace zo {
namespace cuda {

constexpr int THREADS = 128;
constexpr int64_t SPAN = ZO_CUDA_SPAN; /* elements that a block works on at a time, a group per thread */
static_assert(SPAN == THREADS * 16, "a group per thread");
constexpr int STAGE = 1024; /* terms that shared memory holds: 8 KiB; more are read from device memory */

/* ---- weight types: a group of 16 as packed 32-bit words, two elements at a time --------------------------------- */

struct F32 {
  using element = uint32_t;
  static constexpr int WORDS = 16; /* 32-bit words per group */
  static ZO_MEMBER void get(const uint32_t *w, int pair, float &x, float &y) {
    x = as_float(w[2 * pair]);
    y = as_float(w[2 * pair + 1]);
  }
  static ZO_MEMBER void put(uint32_t *w, int pair, float x, float y) {
    w[2 * pair] = as_bits(x);
    w[2 * pair + 1] = as_bits(y);
  }
  static ZO_MEMBER void put_stochastic(uint32_t *w, int pair, float x, float y, uint32_t) { put(w, pair, x, y); }
  static ZO_MEMBER uint32_t single(const uint32_t *w, int a) { return w[a]; }
  static ZO_MEMBER void insert(uint32_t *w, int a, uint32_t x) { w[a] = x; }
};

struct Half16 { /* what fp16 and bf16 share */
  using element = uint16_t;
  static constexpr int WORDS = 8;
  static ZO_MEMBER uint16_t single(const uint32_t *w, int a) { return (uint16_t)(w[a / 2] >> (16 * (a % 2))); }
  static ZO_MEMBER void insert(uint32_t *w, int a, uint32_t x) { w[a / 2] |= x << (16 * (a % 2)); }
};

struct F16 : Half16 {
  static ZO_MEMBER void get(const uint32_t *w, int pair, float &x, float &y) {
#ifdef __CUDA_ARCH__
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(x), "=f"(y)
        : "r"(w[pair]));
#else
    x = half_to_float((uint16_t)w[pair]);
    y = half_to_float((uint16_t)(w[pair] >> 16));
#endif
  }
  static ZO_MEMBER void put(uint32_t *w, int pair, float x, float y) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[pair]) : "f"(y), "f"(x));
#else
    w[pair] = float_to_half(x) | (uint32_t)float_to_half(y) << 16;
#endif
  }
  static ZO_MEMBER void put_stochastic(uint32_t *w, int pair, float x, float y, uint32_t v) {
    put(w, pair, stochastic_half_value(x, v & 0xFFFFu), stochastic_half_value(y, v >> 16));
  }
};

struct BF16 : Half16 {
  static ZO_MEMBER void get(const uint32_t *w, int pair, float &x, float &y) {
    x = as_float(w[pair] << 16);
    y = as_float(w[pair] & 0xFFFF0000u);
  }
  static ZO_MEMBER void put(uint32_t *w, int pair, float x, float y) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[pair]) : "f"(y), "f"(x));
#else
    w[pair] = float_to_bfloat(x) | (uint32_t)float_to_bfloat(y) << 16;
#endif
  }
  static ZO_MEMBER void put_stochastic(uint32_t *w, int pair, float x, float y, uint32_t v) {
    w[pair] = float_to_bfloat_stochastic(x, v & 0xFFFFu) | (uint32_t)float_to_bfloat_stochastic(y, v >> 16) << 16;
  }
};

/* Pointers that come from a table in memory are generic to the compiler, unless it is told. Not for a null pointer. */
template <class P> ZO_DEVICE P *global(P *p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

/* ---- memory of one group ---------------------------------------------------------------------------------------- */

template <class T> ZO_DEVICE void load_whole(uint32_t *w, const typename T::element *p) {
#pragma unroll
  for (int k = 0; k < T::WORDS / 4; ++k) {
    const int chunk = k / (T::WORDS / 8), part = k % (T::WORDS / 8);
    const uint4 x = *reinterpret_cast<const uint4 *>(p + 16 * chunk + part * (16 / sizeof(*p)));
    w[4 * k] = x.x, w[4 * k + 1] = x.y, w[4 * k + 2] = x.z, w[4 * k + 3] = x.w;
  }
}

template <class T> ZO_DEVICE void store_whole(const uint32_t *w, typename T::element *p) {
#pragma unroll
  for (int k = 0; k < T::WORDS / 4; ++k) {
    const int chunk = k / (T::WORDS / 8), part = k % (T::WORDS / 8);
    uint4 x;
    x.x = w[4 * k], x.y = w[4 * k + 1], x.z = w[4 * k + 2], x.w = w[4 * k + 3];
    *reinterpret_cast<uint4 *>(p + 16 * chunk + part * (16 / sizeof(*p))) = x;
  }
}

/* Place of output a within its group's 24 elements, and the places that lie inside the tensor. 32-bit, to be cheap. */
ZO_DEVICE constexpr uint32_t place_of(int a) { return a < 8 ? a : a + 8; }

struct Places {
  uint32_t first, count;
  ZO_MEMBER bool has(int a) const { return place_of(a) - first < count; }
};

ZO_DEVICE Places places(int64_t e, int64_t numel) {
  const int64_t first = e < 0 ? -e : 0, end = numel - e < 24 ? numel - e : 24;
  return {(uint32_t)first, end > first ? (uint32_t)(end - first) : 0};
}

template <class T> ZO_DEVICE void load_part(uint32_t *w, const typename T::element *p, Places inside) {
#pragma unroll
  for (int k = 0; k < T::WORDS; ++k) w[k] = 0;
#pragma unroll
  for (int a = 0; a < 16; ++a) {
    if (inside.has(a)) T::insert(w, a, p[place_of(a)]);
  }
}

template <class T> ZO_DEVICE void store_part(const uint32_t *w, typename T::element *p, Places inside) {
#pragma unroll
  for (int a = 0; a < 16; ++a) {
    if (inside.has(a)) p[place_of(a)] = T::single(w, a);
  }
}

/* ---- the launch's arguments ------------------------------------------------------------------------------------- */

/* What the compiler knows to be a kernel argument (or can compute from one) it fetches anew in every call of Philox,
 * ten instructions and more. The result of a warp reduction it must keep, in a uniform register where it can. All lanes
 * must call this together, with the same x. */
ZO_DEVICE uint32_t opaque(uint32_t x) { return __reduce_or_sync(0xFFFFFFFFu, x); }

struct Launch {
  zo_pass pass;
  Keys keys;     /* of pass.seed */
  uint32_t base; /* F_BASE, which the compiler must not know: see f_value */
  int64_t tile;  /* elements of a tile of the work map, a multiple of SPAN */
  const zo_tensor *table;
  const uint2 *map;
};

/* ---- terms ------------------------------------------------------------------------------------------------------ */

struct alignas(8) Term {
  uint32_t tag;
  float c; /* Gaussian: c'; 0 if the term is not live. Adding 0 * f is harmless: a sum that starts at +0 is never -0 */
};

struct alignas(16) Shared {
  Term terms[STAGE];
  uint32_t base; /* what is loaded, the compiler must keep as well; LOP3 needs this one in an ordinary register */
};

ZO_DEVICE uint32_t term_tag(const zo_pass &pass, int64_t k) {
  return pass.tags ? (uint32_t)pass.tags[k] : pass.inline_tags[k];
}

template <int KIND> ZO_DEVICE Term make_term(const zo_pass &pass, int64_t k) {
  const float c = pass.tags ? pass.coefs[k] : pass.inline_coefs[k];
  Term t;
  t.tag = term_tag(pass, k);
  t.c = KIND == ZO_GAUSSIAN ? gaussian_coefficient(c) : rademacher_coefficient(c);
  return t;
}

/* The first STAGE of n_terms terms into shared memory, by the whole block; returns whether any of them all is live.
 * Ends with a barrier. */
template <int KIND> ZO_DEVICE bool stage(const zo_pass &pass, Term *terms, int64_t n_terms) {
  bool live = false;
  for (int64_t k = threadIdx.x; k < n_terms; k += THREADS) {
    const Term t = make_term<KIND>(pass, k);
    live |= t.c != 0.0f;
    if (k < STAGE) terms[k] = t;
  }
  return opaque(__syncthreads_or(live)) != 0;
}

/* s[a] <- s[a] + c' f[a], or c' f[a] for the FIRST term, for the group of call q. (A first term that is not live may
 * leave -0, which every live one after it removes.) */
template <int KIND, bool FIRST>
ZO_DEVICE void add_term(float *s, Term t, uint64_t q, uint32_t stream, const Keys &keys, uint32_t base) {
  if constexpr (KIND == ZO_GAUSSIAN) {
    const Words w = call_keyed(q, PURPOSE_GAUSSIAN, stream, t.tag, keys);
#pragma unroll
    for (int a = 0; a < 16; ++a) {
      const float x = t.c * f_value(w.w[a / 4], a % 4, base); /* exact, so that fma or not is the same */
      s[a] = FIRST ? x : s[a] + x;
    }
  } else {
    const Words w = call_keyed(q >> 3, PURPOSE_RADEMACHER, stream, t.tag, keys); /* i >> 7 */
    const uint32_t place = (uint32_t)(q >> 1) & 3u;                              /* i >> 5 & 3 */
    const uint32_t low = place & 1u ? w.w[1] : w.w[0], high = place & 1u ? w.w[3] : w.w[2];
    const uint32_t bits = (place & 2u ? high : low) >> (8 * ((uint32_t)q & 1u)); /* the signs: bits 0 .. 7, 16 .. 23 */
#pragma unroll
    for (int a = 0; a < 16; ++a) {
      const float x = as_float(as_bits(t.c) ^ ((bits << (31 - place_of(a))) & 0x80000000u));
      s[a] = FIRST ? x : s[a] + x;
    }
  }
}

/* s = sum_k c'_k f_k over terms[0 .. count - 1], at least one, and what `further` adds if there is more than one; for
 * Gaussian noise, mixed. */
template <int KIND, class Further>
ZO_DEVICE void sum(float *s, const Term *terms, uint32_t count, uint64_t q, uint32_t stream, const Keys &keys,
                   uint32_t base, Further further) {
  add_term<KIND, true>(s, terms[0], q, stream, keys, base);
  if (count > 1) {
    uint32_t k = 1;
#pragma unroll 1
    do add_term<KIND, false>(s, terms[k], q, stream, keys, base);
    while (++k != count);
    further();
  }
  if constexpr (KIND == ZO_GAUSSIAN) mix<1>(s);
}

/* The same over all terms of one pass, of which shared memory holds the first `staged`. */
template <int KIND>
ZO_DEVICE void noise(float *s, const zo_pass &pass, const Term *terms, uint32_t staged, uint64_t q, uint32_t stream,
                     const Keys &keys, uint32_t base) {
  sum<KIND>(s, terms, staged, q, stream, keys, base, [&] {
#pragma unroll 1
    for (int64_t far = STAGE; far < pass.n_terms; ++far) {
      add_term<KIND, false>(s, make_term<KIND>(pass, far), q, stream, keys, base);
    }
  });
}

/* ---- sequences of passes ---------------------------------------------------------------------------------------- */

/* One pass, as the loop over passes wants it: most have one live term, no decay and the nearest rounding. */
enum : uint32_t { STEP_USUAL = 0, STEP_OTHER = 1, STEP_LIVE = 2, STEP_STOCHASTIC = 4 };

struct alignas(16) Step {
  uint32_t tag; /* of the first term, 0 if there is none */
  float c;      /* the coefficient, if the step is STEP_USUAL */
  float decay;
  uint32_t flags; /* STEP_USUAL, or STEP_OTHER and what applies */
};

ZO_DEVICE Step *steps_of(const zo_pass &pass) { return static_cast<Step *>(pass.scratch); }
ZO_DEVICE Term *terms_of(const zo_pass &pass) { return reinterpret_cast<Term *>(steps_of(pass) + pass.n_passes); }

/* Term `index` and pass `index` into the scratch memory; for every index below both counts. */
template <int KIND> ZO_DEVICE void prepare_step(const zo_pass &pass, int64_t index) {
  if (index < pass.n_terms) terms_of(pass)[index] = make_term<KIND>(pass, index);
  if (index >= pass.n_passes) return;
  const int64_t begin = pass.first[index], end = pass.first[index + 1];
  Step step = {0, 0.0f, pass.decays[index], STEP_OTHER};
  if ((as_bits(step.decay) & 0x7F800000u) == 0x7F800000u) step.decay = 1.0f;
  if (begin < end) step.tag = term_tag(pass, begin);
  for (int64_t k = begin; k < end; ++k) {
    step.c = make_term<KIND>(pass, k).c;
    if (step.c != 0.0f) step.flags |= STEP_LIVE;
  }
  if (pass.roundings[index] == ZO_STOCHASTIC && pass.dtype != ZO_F32) step.flags |= STEP_STOCHASTIC;
  if (end - begin == 1 && step.decay == 1.0f && step.flags == (STEP_OTHER | STEP_LIVE)) step.flags = STEP_USUAL;
  steps_of(pass)[index] = step;
}

/* ---- mask, scale ------------------------------------------------------------------------------------------------ */

/* Bit a of the result: whether the bit mask keeps output a. e counts from the mask's first bit. */
ZO_DEVICE uint32_t bit_mask(const uint8_t *mask, int64_t e, Places inside) {
  if (e % 8 == 0 && inside.count == 24) return mask[e / 8] | (uint32_t)mask[e / 8 + 2] << 8;
  uint32_t keep = 0;
#pragma unroll 1
  for (int a = 0; a < 16; ++a) {
    const int64_t bit = e + place_of(a);
    if (inside.has(a)) keep |= (mask[bit >> 3] >> (bit & 7) & 1u) << a;
  }
  return keep;
}

/* The octet's call (i >> 3) of the first element of a chunk of group q. */
ZO_DEVICE uint64_t octet_of(uint64_t q, int chunk) { return 2 * q - (q & 1) + 2 * chunk; }

ZO_DEVICE uint32_t random_mask(uint64_t q, uint32_t threshold, uint32_t tag, uint32_t stream, const Keys &keys) {
  uint32_t keep = 0;
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    const Words w = call_keyed(octet_of(q, chunk), PURPOSE_MASK, stream, tag, keys);
#pragma unroll
    for (int j = 0; j < 8; ++j) keep |= (uint32_t)random_keep(w, j, threshold) << (8 * chunk + j);
  }
  return keep;
}

/* x / d. A 64-bit division costs a hundred instructions, a 32-bit one twenty; most indices fit. */
ZO_DEVICE uint64_t divide(uint64_t x, uint64_t d) {
  if (x < d) return 0;
  if (((x | d) >> 32) == 0) return (uint32_t)x / (uint32_t)d;
  return x / d;
}

/* s[a] <- RN(s[a] * scale). `scale` points at the value of block 0; `value` makes a scale of what it points at. */
template <class Value>
ZO_DEVICE void apply_scale(float *s, const float *scale, uint64_t block, uint64_t i, Places inside, Value value) {
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    const uint64_t first = i + 16 * chunk;
    int64_t at = (int64_t)divide(first, block);
    if (block % 8 == 0) {
      if (16u * chunk + 7 < inside.first || inside.first + inside.count <= 16u * chunk)
        continue; /* perhaps beyond the table */
      const float x = value(scale[at]);
#pragma unroll
      for (int j = 0; j < 8; ++j) s[8 * chunk + j] = mul_rn(s[8 * chunk + j], x);
    } else {
      uint64_t rest = first - (uint64_t)at * block;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (inside.has(8 * chunk + j)) s[8 * chunk + j] = mul_rn(s[8 * chunk + j], value(scale[at]));
        if (++rest == block) rest = 0, ++at;
      }
    }
  }
}

/* ---- low-rank directions ---------------------------------------------------------------------------------------- */

/* s[a] = RN(c z), z the sum over rho of left[row][rho] * right[rho][column]; i is the index of output 0. The products
 * are exact, so that fma or not is the same. Places outside the tensor may be outside the matrix: not read. */
ZO_DEVICE void low_rank(float *s, const zo_tensor *t, float c, uint64_t i, Places inside) {
  const float *const left = global(t->left), *const right = global(t->right);
  const uint32_t rank = t->rank;
  const uint64_t cols = (uint64_t)t->cols;
  const bool eights = cols % 8 == 0 && (reinterpret_cast<uintptr_t>(right) & 15u) == 0;
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    float *const z = s + 8 * chunk;
#pragma unroll
    for (int j = 0; j < 8; ++j) z[j] = 0.0f;
    if (16u * chunk + 7 < inside.first || inside.first + inside.count <= 16u * chunk) continue;
    const uint64_t first = i + 16 * chunk;
    uint64_t row = divide(first, cols), column = first - row * cols;
    if (eights) { /* the eight lie in one row */
      const float *x = left + row * rank, *y = right + column;
#pragma unroll 1
      for (uint32_t rho = 0; rho < rank; ++rho, y += cols) {
        const float factor = global(x)[rho];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 four = reinterpret_cast<const uint4 *>(global(y))[half];
          z[4 * half] += factor * as_float(four.x);
          z[4 * half + 1] += factor * as_float(four.y);
          z[4 * half + 2] += factor * as_float(four.z);
          z[4 * half + 3] += factor * as_float(four.w);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (inside.has(8 * chunk + j)) {
#pragma unroll 1
          for (uint32_t rho = 0; rho < rank; ++rho) z[j] += left[row * rank + rho] * right[rho * cols + column];
        }
        if (++column == cols) column = 0, ++row;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) z[j] = mul_rn(c, z[j]);
  }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

/* theta of group q, packed in w, to its new value. MASKED: bit a of keep = the sum is added to output a. */
template <class T, int ROUNDING, bool DECAY, bool MASKED>
ZO_DEVICE void update(uint32_t *w, const float *s, uint32_t keep, float decay, uint64_t q, uint32_t stream,
                      uint32_t tag, const Keys &keys) {
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    Words v = {};
    if constexpr (ROUNDING == ZO_STOCHASTIC) v = call_keyed(octet_of(q, chunk), PURPOSE_ROUNDING, stream, tag, keys);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int pair = 4 * chunk + k, a = 2 * pair;
      float x, y;
      T::get(w, pair, x, y);
      if constexpr (DECAY) {
        x = mul_rn(x, decay);
        y = mul_rn(y, decay);
      }
      if constexpr (MASKED) {
        x = keep >> a & 1u ? x + s[a] : x;
        y = keep >> (a + 1) & 1u ? y + s[a + 1] : y;
      } else {
        x += s[a];
        y += s[a + 1];
      }
      if constexpr (ROUNDING == ZO_STOCHASTIC)
        T::put_stochastic(w, pair, x, y, v.w[k]);
      else
        T::put(w, pair, x, y);
    }
  }
}

/* theta of group q through all passes of a sequence. `scaled(s)` applies the scale, if there is one. */
template <class T, int KIND, bool LEAN, class Scaled>
ZO_DEVICE void run_steps(uint32_t *w, const zo_pass &pass, uint32_t n_passes, uint32_t keep, uint64_t q,
                         uint32_t stream, const Keys &keys, uint32_t base, Scaled scaled) {
  const Step *next = steps_of(pass);
#pragma unroll 1
  for (uint32_t left = n_passes; left; --left) {
    const Step step = *next++;
    float s[16];
    if (LEAN && step.flags == STEP_USUAL) {
      add_term<KIND, true>(s, Term{step.tag, step.c}, q, stream, keys, base);
      if constexpr (KIND == ZO_GAUSSIAN) mix<1>(s);
      update<T, ZO_NEAREST, false, false>(w, s, keep, 1.0f, q, stream, step.tag, keys);
      continue;
    }
    if (step.flags == STEP_USUAL || step.flags & STEP_LIVE) {
      const int64_t *const first = pass.first + (n_passes - left);
      sum<KIND>(s, terms_of(pass) + first[0], (uint32_t)(first[1] - first[0]), q, stream, keys, base, [] {});
      scaled(s);
    } else {
#pragma unroll
      for (int a = 0; a < 16; ++a) s[a] = -0.0f; /* x + -0 is x, for every x */
    }
    if (sizeof(typename T::element) == 2 && step.flags & STEP_STOCHASTIC)
      update<T, ZO_STOCHASTIC, true, !LEAN>(w, s, keep, step.decay, q, stream, step.tag, keys);
    else
      update<T, ZO_NEAREST, true, !LEAN>(w, s, keep, step.decay, q, stream, step.tag, keys);
  }
}

/* What ROUNDING of a kernel may be besides a zo_rounding: a sequence, whose passes have roundings of their own. */
constexpr int SEQUENCE = 2;

/* One block per tile. `map[block]` is (tensor, tile within it). FORM: a zo_form. */
template <class T, int KIND, int ROUNDING, int FORM> ZO_DEVICE void perturb_tile(const Launch &launch, Shared &shared) {
  using element = typename T::element;
  constexpr bool LEAN = FORM == ZO_LEAN, EXTENDED = FORM == ZO_EXTENDED;
  const zo_pass &pass = launch.pass;
  const uint2 where = launch.map[blockIdx.x];
  const zo_tensor *t = launch.table + where.x;
  const element *src = global(static_cast<const element *>(t->src));
  element *dst = global(static_cast<element *>(t->dst));
  int64_t numel = t->numel, offset = t->offset, first = (int64_t)where.y * launch.tile;
  const uint32_t stream = t->stream;

  if (threadIdx.x == 0) shared.base = launch.base; /* stage() ends with a barrier */
  bool live = stage<KIND>(pass, shared.terms, ROUNDING == SEQUENCE ? 0 : pass.n_terms);
  const uint32_t base = shared.base;
  const uint32_t staged = opaque(pass.n_terms < STAGE ? (uint32_t)pass.n_terms : STAGE);
  const uint32_t n_passes = (uint32_t)pass.n_passes;
  Keys keys;
#pragma unroll
  for (int k = 0; k < 20; ++k) keys.k[k] = opaque(launch.keys.k[k]);
  const uint32_t tag = ROUNDING == ZO_STOCHASTIC && pass.n_terms ? term_tag(pass, 0) : 0;

  float decay = 1.0f;
  if constexpr (!LEAN && ROUNDING != SEQUENCE) {
    if (pass.has_decay) decay = pass.decay_ptr ? *pass.decay_ptr : pass.decay;
    if ((as_bits(decay) & 0x7F800000u) == 0x7F800000u) decay = 1.0f;
  }
  uint32_t rank = 0;
  float coefficient = 0.0f; /* of a low-rank direction, which has a single term */
  if constexpr (EXTENDED) {
    rank = t->rank;
    if (rank) {
      if (pass.n_terms) coefficient = rademacher_coefficient(pass.tags ? pass.coefs[0] : pass.inline_coefs[0]);
      live = coefficient != 0.0f;
    }
  }
  /* Not one bit changes; known no earlier, since terms may lie on the device. */
  const bool copy = ROUNDING == SEQUENCE ? n_passes == 0 : !live && decay == 1.0f;
  if (copy && src == dst) return;

  /* Gathered rows whose length is a multiple of 32: e and i differ by a multiple of 32 within each row. Other rows:
   * each is a shard of its own, and the map's tiles count through all rows. */
  const uint8_t *mask = nullptr;
  const float *scale = nullptr;
  const int64_t *rows = nullptr;
  int64_t row_len = 0, mask_e = 0;
  if constexpr (!LEAN) {
    mask = t->mask;
    rows = t->rows;
    row_len = t->row_len;
    if (t->scale) scale = t->scale - divide((uint64_t)offset, (uint64_t)t->scale_block);
    if (rows && row_len % 32 != 0) {
      const uint32_t per_row = (uint32_t)((row_len + 30 + launch.tile) / launch.tile), row = where.y / per_row;
      mask_e = row * row_len;
      src += mask_e;
      dst += mask_e;
      numel = row_len;
      offset = global(rows)[row] * row_len;
      first = (int64_t)(where.y % per_row) * launch.tile;
      rows = nullptr;
    } else if (rows) {
      offset = 0;
    }
  }

  /* The tile's spans, of local elements first, first + 1, ...; those from `skip` on and below `full` are whole. */
  first -= offset & 31;
  const int64_t length = numel - first < launch.tile ? numel - first : launch.tile;
  if (length <= 0) return;
  const uint32_t spans = (uint32_t)((length + SPAN - 1) / SPAN);
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst)) & 15u) == 0 && offset % 8 == 0;
  const uint32_t skip = first < 0, full = aligned ? (uint32_t)(length / SPAN) : 0;

  const uint32_t own = (threadIdx.x >> 1) * 32 + (threadIdx.x & 1) * 8; /* the thread's place within a span */
  uint64_t q = (uint64_t)(offset + first) / 16 + threadIdx.x;           /* its call */
  src += first + own;
  dst += first + own;
  for (uint32_t span = 0; span < spans; ++span, q += SPAN / 16, src += SPAN, dst += SPAN) {
    const bool whole = span >= skip && span < full;
    const auto element_here = [&] { return first + (int64_t)span * SPAN + own; };
    uint32_t w[T::WORDS];
    if (whole)
      load_whole<T>(w, src);
    else
      load_part<T>(w, src, places(element_here(), numel));
    if (!copy) {
      uint32_t keep = 0xFFFFu;
      float s[16];
      if constexpr (LEAN && ROUNDING == SEQUENCE) {
        run_steps<T, KIND, LEAN>(w, pass, n_passes, keep, q, stream, keys, base, [](float *) {});
      } else if constexpr (LEAN) {
        noise<KIND>(s, pass, shared.terms, staged, q, stream, keys, base);
        update<T, ROUNDING, false, false>(w, s, keep, decay, q, stream, tag, keys);
      } else {
        const int64_t e = element_here();
        const Places inside = places(e, numel);
        uint64_t call = q;
        if (rows && inside.count) {
          const uint64_t row = divide((uint64_t)e, (uint64_t)row_len);
          call = gaussian_call((uint64_t)e + (uint64_t)((global(rows)[row] - (int64_t)row) * row_len));
        }
        if (mask) keep = bit_mask(global(mask), mask_e + e, inside);
        if (t->keep) keep &= random_mask(call, t->keep, t->mask_tag, stream, keys);
        const auto scaled = [&](float *sum) {
          if (scale) {
            const uint64_t i = (call >> 1) * 32 + (call & 1) * 8;
            const auto same = [](float x) { return x; };
            if (EXTENDED && t->rsqrt)
              apply_scale(sum, global(scale), (uint64_t)t->scale_block, i, inside, inverse_root);
            else
              apply_scale(sum, global(scale), (uint64_t)t->scale_block, i, inside, same);
          }
        };
        if constexpr (ROUNDING == SEQUENCE) {
          run_steps<T, KIND, LEAN>(w, pass, n_passes, keep, call, stream, keys, base, scaled);
        } else {
          if (live) {
            if (EXTENDED && rank)
              low_rank(s, t, coefficient, (call >> 1) * 32 + (call & 1) * 8, inside);
            else
              noise<KIND>(s, pass, shared.terms, staged, call, stream, keys, base);
            scaled(s);
          } else {
            keep = 0;
          }
          update<T, ROUNDING, true, true>(w, s, keep, decay, call, stream, tag, keys);
        }
      }
    }
    if (whole)
      store_whole<T>(w, dst);
    else
      store_part<T>(w, dst, places(element_here(), numel));
  }
}

/* ---- which kernel ------------------------------------------------------------------------------------------------ */

template <class T_, int KIND_, int ROUNDING_, int FORM_> struct Variant {
  using T = T_;
  static constexpr int KIND = KIND_, ROUNDING = ROUNDING_, FORM = FORM_;
};

template <class T, int KIND, int ROUNDING, class F> int with_form(int form, F f) {
  if constexpr (ROUNDING != SEQUENCE) {
    if (form == ZO_EXTENDED) return f(Variant<T, KIND, ROUNDING, ZO_EXTENDED>{});
  }
  return form == ZO_LEAN ? f(Variant<T, KIND, ROUNDING, ZO_LEAN>{}) : f(Variant<T, KIND, ROUNDING, ZO_GENERAL>{});
}

template <class T, class F> int with_kind(const zo_pass &pass, int form, F f) {
  /* The stochastic cast to fp32 is the identity: that kernel would be the same one. */
  if (pass.first) {
    return pass.kind == ZO_GAUSSIAN ? with_form<T, ZO_GAUSSIAN, SEQUENCE>(form, f)
                                    : with_form<T, ZO_RADEMACHER, SEQUENCE>(form, f);
  }
  const bool stochastic = pass.rounding == ZO_STOCHASTIC && sizeof(typename T::element) == 2;
  constexpr int OTHER = sizeof(typename T::element) == 2 ? ZO_STOCHASTIC : ZO_NEAREST;
  if (pass.kind == ZO_GAUSSIAN) {
    return stochastic ? with_form<T, ZO_GAUSSIAN, OTHER>(form, f) : with_form<T, ZO_GAUSSIAN, ZO_NEAREST>(form, f);
  }
  return stochastic ? with_form<T, ZO_RADEMACHER, OTHER>(form, f) : with_form<T, ZO_RADEMACHER, ZO_NEAREST>(form, f);
}

/* f(Variant{}) for the kernel that serves this pass. */
template <class F> int dispatch(const zo_pass &pass, int form, F f) {
  if (pass.dtype == ZO_F32) return with_kind<F32>(pass, form, f);
  if (pass.dtype == ZO_F16) return with_kind<F16>(pass, form, f);
  return with_kind<BF16>(pass, form, f);
}

} // namespace cuda
} // namespace zo
#endif
