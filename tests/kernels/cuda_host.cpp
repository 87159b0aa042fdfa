/* cuda_host.cpp - the CUDA kernels' bodies of csrc/cuda as host code, so that its bits can be tested without a
 * GPU.
 *
 * Belongs here: what the body needs of CUDA, and the loop over blocks and threads. test_cuda_host.py compiles it.
 *
 * A body's barriers are all in stage() or stage_rule(), and what comes before them only writes shared memory, the same
 * each time. So every thread of a block runs once more than there are barriers: first up to the first barrier, which
 * throws; then from the start to the next one; at last to the end.
 */
#include <stdint.h>

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static thread_local struct {
  uint32_t x, y, z;
} threadIdx, blockIdx;

namespace {
struct Barrier {};
int passed, closed; /* barriers that the running thread has passed; the one that throws */
bool any[2];        /* what they return */
} // namespace

static int __syncthreads_or(int predicate) {
  const int here = passed++;
  any[here] |= predicate != 0;
  if (here == closed) throw Barrier();
  return any[here];
}

/* The body calls it with a value that is the same in all lanes. */
static uint32_t __reduce_or_sync(uint32_t, uint32_t x) { return x; }

#include "../../csrc/cuda/mask.cuh"
#include "../../csrc/cuda/update.cuh"

namespace {

/* Every thread of every block, up to each barrier and then as a whole. */
template <class Body> void run_blocks(int64_t tiles, Body body) {
  for (int64_t block = 0; block < tiles; ++block) {
    blockIdx.x = (uint32_t)block;
    any[0] = any[1] = false;
    bool stopped = true;
    for (closed = 0; stopped; ++closed) {
      stopped = false;
      for (threadIdx.x = 0; threadIdx.x < (uint32_t)zo::cuda::THREADS; ++threadIdx.x) {
        passed = 0;
        try {
          body();
        } catch (Barrier) {
          stopped = true;
        }
      }
    }
  }
}

} // namespace

extern "C" int zo_cuda_perturb(const zo_pass *pass, const zo_tensor *table, const uint32_t *map, int64_t tiles,
                               int64_t tile, int form, void *) {
  using namespace zo::cuda;
  if (tile <= 0 || tile % SPAN || (pass->first && form == ZO_EXTENDED)) return 1;
  if (pass->first) {
    for (int64_t k = 0; k < pass->n_passes || k < pass->n_terms; ++k) {
      pass->kind == ZO_GAUSSIAN ? prepare_step<ZO_GAUSSIAN>(*pass, k) : prepare_step<ZO_RADEMACHER>(*pass, k);
    }
  }
  const Launch launch = {
      *pass, zo::schedule(pass->seed), zo::F_BASE, tile, table, reinterpret_cast<const uint2 *>(map)};
  return dispatch(*pass, form, [&](auto variant) -> int {
    using V = decltype(variant);
    static Shared shared;
    run_blocks(tiles, [&] { perturb_tile<typename V::T, V::KIND, V::ROUNDING, V::FORM>(launch, shared); });
    return 0;
  });
}

extern "C" int zo_cuda_update(const zo_update *update, const zo_tensor *table, const zo_states *states,
                              const uint32_t *map, int64_t tiles, int64_t tile, void *) {
  using namespace zo::cuda;
  if (tile <= 0 || tile % SPAN) return 1;
  const UpdateLaunch launch = {*update, zo::schedule(update->pass.seed),     zo::F_BASE, tile, table,
                               states,  reinterpret_cast<const uint2 *>(map)};
  return dispatch_rule(*update, [&](auto variant) -> int {
    using V = decltype(variant);
    static Shared shared;
    run_blocks(tiles, [&] { update_tile<typename V::T, V::RULE, typename V::S>(launch, shared); });
    return 0;
  });
}

extern "C" int zo_cuda_magnitude_mask(int dtype, const zo_tensor *table, const float *limits, const uint32_t *map,
                                      int64_t tiles, int64_t tile, void *) {
  using namespace zo::cuda;
  if (tile <= 0 || tile % SPAN) return 1;
  const MaskLaunch launch = {table, limits, reinterpret_cast<const uint2 *>(map), tile};
  return dispatch_dtype(dtype, [&](auto type) -> int {
    run_blocks(tiles, [&] { mask_tile<decltype(type)>(launch); });
    return 0;
  });
}
