/* mask.cuh - the CUDA kernel of masks by magnitude: one read of the weights, a bit for each written.
 *
 * A thread makes two bytes of a span, of 8 elements each, half a span apart; both are on their way before either is
 * compared. A tile has the bytes whose first elements lie in it, so that its blocks share none, whatever the offset.
 * Why the comparison does not stand in the kernels that perturb: csrc/cpu/mask_tile.h.
 *
 * Belongs here: device code only, which also compiles as host C++, as in perturb.cuh.
 */
#ifndef ZO_CUDA_MASK_CUH
#define ZO_CUDA_MASK_CUH

#include "perturb.cuh"

namespace zo {
namespace cuda {

struct MaskLaunch {
  const zo_tensor *table;
  const float *limits;
  const uint2 *map;
  int64_t tile;
};

/* The eight elements from p on, of which `n` are there; the others are 0. */
template <class T> ZO_DEVICE void load_octet(uint32_t *w, const typename T::element *p, int64_t n, bool aligned) {
  if (aligned && n >= 8) {
#pragma unroll
    for (int k = 0; k < T::WORDS / 8; ++k) {
      const uint4 four = reinterpret_cast<const uint4 *>(p)[k];
      w[4 * k] = four.x, w[4 * k + 1] = four.y, w[4 * k + 2] = four.z, w[4 * k + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < T::WORDS / 2; ++k) w[k] = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < n) T::insert(w, j, p[j]);
  }
}

template <class T> ZO_DEVICE void mask_tile(const MaskLaunch &launch) {
  using element = typename T::element;
  const uint2 where = launch.map[blockIdx.x];
  const zo_tensor *t = launch.table + where.x;
  const element *src = global(static_cast<const element *>(t->src));
  uint8_t *bits = global(const_cast<uint8_t *>(t->mask));
  const float given = launch.limits[where.x];
  /* The order of magnitudes is that of their bits, with the NaNs above infinity. */
  const uint32_t limit = given >= 0 ? (as_bits(given) & 0x7FFFFFFFu) + 1 : 0;
  const bool aligned = (reinterpret_cast<uintptr_t>(src) & 15u) == 0;
  const int64_t numel = t->numel;
  const int64_t start = ((int64_t)where.y * launch.tile - (t->offset & 31) + 7) & ~(int64_t)7;
  for (int64_t span = start; span < start + launch.tile && span < numel; span += SPAN) {
    uint32_t w[2][T::WORDS / 2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t e = span + half * (SPAN / 2) + (int64_t)threadIdx.x * 8;
      if (e >= 0) load_octet<T>(w[half], src + e, numel - e, aligned);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t e = span + half * (SPAN / 2) + (int64_t)threadIdx.x * 8;
      if (e < 0 || e >= numel) continue;
      uint32_t byte = 0;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float x, y;
        T::get(w[half], pair, x, y);
        if ((as_bits(x) & 0x7FFFFFFFu) < limit) byte |= 1u << (2 * pair);
        if ((as_bits(y) & 0x7FFFFFFFu) < limit) byte |= 2u << (2 * pair);
      }
      if (numel - e < 8) byte &= (1u << (numel - e)) - 1;
      bits[e >> 3] = (uint8_t)byte;
    }
  }
}

/* f(T{}) for weights of this dtype. */
template <class F> int dispatch_dtype(int dtype, F f) {
  return dtype == ZO_F32 ? f(F32{}) : dtype == ZO_F16 ? f(F16{}) : f(BF16{});
}

} // namespace cuda
} // namespace zo
#endif
