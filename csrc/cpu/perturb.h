/* perturb.h - what the instruction sets share: the work order of one call, and the signature they implement.
 *
 * Belongs here: types that perturb.cpp (terms, threads, choice of the instruction set) hands to perturb_<isa>.cpp. Does
 * not belong here: loops (tile.h), vectors (simd.h), functions with external linkage in a header: these files are
 * compiled with different -m flags, and the linker would keep one copy of an inline function for all of them.
 */
#ifndef ZO_CPU_PERTURB_H
#define ZO_CPU_PERTURB_H

#include "../zo_kernels.h"

namespace zo {

/* A live term; c is c' for Gaussian noise. */
struct Term {
  uint32_t tag;
  float c;
};

/* One pass. */
struct Job {
  uint64_t seed;
  const Term *terms; /* the live ones, in order */
  int64_t n_terms;
  float decay; /* finite; 1 if there is none */
  bool has_decay;
  bool gaussian;
  bool stochastic; /* false for fp32 weights */
  int dtype;
  uint32_t rounding_tag; /* of the first term of the pass, live or not */
  const Job *next;       /* the pass that follows on each tile while it lies in L1, or nullptr */
};

/* All passes from `job` on, over local elements [begin, end) of one tensor. */
typedef void PerturbRange(const Job &job, const zo_tensor &tensor, int64_t begin, int64_t end);

PerturbRange perturb_portable;
#if defined(__x86_64__)
PerturbRange perturb_avx2, perturb_avx512;
#endif

/* One pass of an update rule. */
struct UpdateJob {
  Job sum;             /* the terms' sum; its decay is 1, its `next` is nullptr */
  const Term *singles; /* ZO_ADAM_HISTORY: all n_squares terms, with the coefficient of z itself */
  const float *squares;
  int64_t n_squares;
  int rule;
  int state_dtype;
  float numbers[ZO_RULE_NUMBERS]; /* all of them finite, the first not 0 */
};

/* Local elements [begin, end) of one tensor and of its states. */
typedef void UpdateRange(const UpdateJob &job, const zo_tensor &tensor, const zo_states &states, int64_t begin,
                         int64_t end);

UpdateRange update_portable;
#if defined(__x86_64__)
UpdateRange update_avx2, update_avx512;
#endif

/* The mask of |x| <= limit at local elements [begin, end) of one tensor, `limit` as an integer (mask_tile.h). */
typedef void MaskRange(int dtype, uint32_t limit, const zo_tensor &tensor, int64_t begin, int64_t end);

MaskRange mask_portable;
#if defined(__x86_64__)
MaskRange mask_avx2, mask_avx512;
#endif

} // namespace zo
#endif
