/* mask.cpp - the entry of masks by magnitude on the CPU: checks, limits as integers of the weights' type.
 *
 * Belongs here: what happens once per call, beside what perturb.cpp has for every operation. Does not belong here:
 * anything per element (mask_tile.h).
 */
#include <exception>
#include <vector>

#include "../noise.h"
#include "call.h"

namespace {

zo::MaskRange *kernel(int isa) {
#if defined(__x86_64__)
  if (isa == zo::AVX512) return zo::mask_avx512;
  if (isa == zo::AVX2) return zo::mask_avx2;
#else
  (void)isa;
#endif
  return zo::mask_portable;
}

/* The integer behind the largest magnitude of the type that is at most `limit`; 0: there is none. */
uint32_t integer_limit(float limit, int dtype) {
  if (!(limit >= 0)) return 0;
  const uint32_t bits = zo::as_bits(limit) & 0x7FFFFFFFu; /* -0 is 0 */
  if (dtype == ZO_F32) return bits + 1;
  if (dtype == ZO_BF16) return (bits >> 16) + 1;
  const uint16_t nearest = zo::float_to_half(zo::as_float(bits));
  return zo::half_to_float(nearest) > limit ? nearest : nearest + 1u;
}

struct Context {
  int dtype;
  const uint32_t *limits;
  const zo_tensor *tensors;
  zo::MaskRange *range;
};

void run(const void *p, int64_t k, int64_t begin, int64_t end) {
  const Context &c = *static_cast<const Context *>(p);
  c.range(c.dtype, c.limits[k], c.tensors[k], begin, end);
}

} // namespace

extern "C" int zo_cpu_magnitude_mask(int dtype, const zo_tensor *tensors, const float *limits, int64_t n, int threads,
                                     int isa) {
  if (n < 0 || (n && (!tensors || !limits)) || dtype < ZO_F32 || dtype > ZO_BF16 || isa < zo::BEST ||
      isa > zo::AVX512) {
    return zo::BAD_ARGUMENT;
  }
  if (isa > zo_cpu_best_isa()) return zo::UNSUPPORTED_ISA;
  std::vector<uint32_t> integers;
  try {
    integers.resize((size_t)n);
  } catch (const std::exception &) {
    return zo::OUT_OF_MEMORY;
  }
  const zo::IeeeArithmetic ieee; /* a limit may be subnormal */
  int64_t total = 0;
  for (int64_t k = 0; k < n; ++k) {
    const zo_tensor &t = tensors[k];
    if (t.numel < 0 || t.rows || (t.numel && (!t.src || !t.mask))) return zo::BAD_ARGUMENT;
    integers[(size_t)k] = integer_limit(limits[k], dtype);
    total += t.numel;
  }
  const Context context = {dtype, integers.data(), tensors, kernel(isa == zo::BEST ? zo_cpu_best_isa() : isa)};
  return zo::spread({run, &context}, tensors, total, 1, threads);
}
