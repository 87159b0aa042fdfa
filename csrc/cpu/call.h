/* call.h - what happens once per call, for every operation on the CPU: shared by perturb.cpp, which has most of it, and
 * update.cpp.
 *
 * Belongs here: declarations for files that are compiled for the plain architecture. Does not belong here: what the
 * instruction sets share (perturb.h, tile.h).
 */
#ifndef ZO_CPU_CALL_H
#define ZO_CPU_CALL_H

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "perturb.h"

namespace zo {

enum Isa { BEST = 0, PORTABLE = 1, AVX2 = 2, AVX512 = 3 };

enum Error {
  OK = 0,
  BAD_ARGUMENT = -1,
  UNSUPPORTED_ISA = -2,
  OUT_OF_MEMORY = -3,
};

/* The contract's arithmetic: subnormals kept, round to nearest even. A caller may have set otherwise
 * (torch.set_flush_denormal), and a new thread inherits that. */
class IeeeArithmetic {
public:
#if defined(__x86_64__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
  }
  ~IeeeArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

private:
  uint64_t saved_;
#endif
  IeeeArithmetic(const IeeeArithmetic &) = delete;
};

bool sound(const zo_tensor &t);
bool sound(const zo_tensor &t, const zo_pass &p);
bool sound(const zo_pass &p);

/* Terms begin .. end - 1 as a job, whose live ones are written to `live`. `gaussian`: for Gaussian noise. */
Job make_job(const zo_pass &pass, int64_t begin, int64_t end, float decay, int rounding, Term *live, bool gaussian);

/* What is done to local elements [begin, end) of tensor k. */
struct Body {
  void (*run)(const void *context, int64_t k, int64_t begin, int64_t end);
  const void *context;
};

/* `body` over all `total` elements of the tensors, on up to `threads` threads; `work_each` is what an element costs, in
 * passes and terms. Returns an Error. */
int spread(const Body &body, const zo_tensor *tensors, int64_t total, int64_t work_each, int threads);

} // namespace zo
#endif
