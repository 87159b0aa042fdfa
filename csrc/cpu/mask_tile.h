/* mask_tile.h - the mask of |x| <= limit over a range of one tensor: one read of the weights, a bit for each written.
 *
 * Why a pass of its own, and no comparison in the kernels that perturb (Sparse-MeZO, arXiv 2402.15751): in place, the
 * weights at theta + eps z no longer tell which of them were below the limit, and a step that judges them anew adds to
 * other weights than it takes from. So the bits must be kept from theta to theta again, and are then an ordinary mask,
 * which every pass, rule, sequence and replay reads already. In scratch mode, whose passes all read theta itself, the
 * comparison could stand in each of them; but it would be one more variant of every kernel on every backend, to save
 * one read a step of weights that the step's forwards and passes read several times, and a 32nd of that in bits.
 *
 * The comparison is of real numbers. A weight without its sign is an integer whose order is that of the magnitudes,
 * with the NaNs above infinity, so a limit is the integer behind the largest magnitude that is kept, in the weights'
 * type.
 *
 * Belongs here: the walk, and what is left of 64 elements. Does not belong here: whole 64s (each instruction set's
 * `below`), limits as integers (mask.cpp). Everything has internal linkage, see perturb.h.
 */
#ifndef ZO_CPU_MASK_TILE_H
#define ZO_CPU_MASK_TILE_H

#include "perturb.h"

namespace zo {
namespace {

template <class Vectors, class Word> void mask_words(const Word *x, uint32_t limit, int64_t n, uint8_t *bits) {
  constexpr Word MAGNITUDE = (Word) ~(Word)0 >> 1;
  int64_t e = 0;
  for (; e + 64 <= n; e += 64) Vectors::below(x + e, limit, bits + (e >> 3));
  for (; e < n; e += 8) {
    uint8_t byte = 0;
    for (int64_t j = 0; j < 8 && e + j < n; ++j) byte |= (uint8_t)((uint32_t)(x[e + j] & MAGNITUDE) < limit) << j;
    bits[e >> 3] = byte;
  }
}

/* The bytes whose first elements lie in [begin, end): two ranges of a tensor share none. */
template <class Vectors>
void mask_range(int dtype, uint32_t limit, const zo_tensor &tensor, int64_t begin, int64_t end) {
  const int64_t first = (begin + 7) & ~(int64_t)7, behind = (end + 7) & ~(int64_t)7;
  const int64_t last = behind < tensor.numel ? behind : tensor.numel;
  if (first >= last) return;
  uint8_t *const bits = const_cast<uint8_t *>(tensor.mask) + (first >> 3);
  if (dtype == ZO_F32) {
    mask_words<Vectors>(static_cast<const uint32_t *>(tensor.src) + first, limit, last - first, bits);
  } else {
    mask_words<Vectors>(static_cast<const uint16_t *>(tensor.src) + first, limit, last - first, bits);
  }
}

} // namespace
} // namespace zo
#endif
