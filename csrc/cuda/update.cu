/* update.cu - the launch of the CUDA kernel of the update rules: one for a whole list of tensors.
 *
 * Belongs here: what the host does. Does not belong here: arithmetic and memory access (update.cuh). Nothing here
 * allocates, copies or waits, so that a launch can be captured in a CUDA graph.
 */
#include <cuda_runtime.h>

#include "update.cuh"

namespace zo {
namespace cuda {

/* 4 blocks of 128 leave 128 registers for each thread: theta, two states and the sum of a group are up to 64. They have
 * 16 warps with 96 to 192 bytes each and lane in flight, several times what covers the latency of memory. */
template <class V> __global__ void __launch_bounds__(THREADS, 4) update(const __grid_constant__ UpdateLaunch launch) {
  __shared__ Shared shared;
  update_tile<typename V::T, V::RULE, typename V::S>(launch, shared);
}

} // namespace cuda
} // namespace zo

extern "C" int zo_cuda_update(const zo_update *update, const zo_tensor *table, const zo_states *states,
                              const uint32_t *map, int64_t tiles, int64_t tile, void *stream) {
  using namespace zo::cuda;
  const zo_pass &pass = update->pass;
  if (tiles == 0) return 0;
  if (tiles < 0 || tiles > 0x7FFFFFFF || tile <= 0 || tile % SPAN || pass.dtype < ZO_F32 || pass.dtype > ZO_BF16 ||
      pass.first || update->rule < ZO_MOMENTUM || update->rule > ZO_ADAM_HISTORY) {
    return cudaErrorInvalidValue;
  }
  const UpdateLaunch launch = {
      *update, zo::schedule(pass.seed), zo::F_BASE, tile, table, states, reinterpret_cast<const uint2 *>(map)};
  return dispatch_rule(*update, [&](auto variant) -> int {
    zo::cuda::update<decltype(variant)><<<(unsigned)tiles, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    return cudaGetLastError();
  });
}
