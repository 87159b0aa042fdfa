/* mask.cu - the launch of the CUDA kernel of masks by magnitude.
 *
 * Belongs here: what the host does. Does not belong here: what a thread does (mask.cuh). Nothing here allocates, copies
 * or waits, so that a launch can be captured in a CUDA graph.
 */
#include <cuda_runtime.h>

#include "mask.cuh"

namespace zo {
namespace cuda {

template <class T>
__global__ void __launch_bounds__(THREADS) magnitude_mask(const __grid_constant__ MaskLaunch launch) {
  mask_tile<T>(launch);
}

} // namespace cuda
} // namespace zo

extern "C" int zo_cuda_magnitude_mask(int dtype, const zo_tensor *table, const float *limits, const uint32_t *map,
                                      int64_t tiles, int64_t tile, void *stream) {
  using namespace zo::cuda;
  if (tiles == 0) return 0;
  if (tiles < 0 || tiles > 0x7FFFFFFF || tile <= 0 || tile % SPAN || dtype < ZO_F32 || dtype > ZO_BF16) {
    return cudaErrorInvalidValue;
  }
  const MaskLaunch launch = {table, limits, reinterpret_cast<const uint2 *>(map), tile};
  return dispatch_dtype(dtype, [&](auto type) -> int {
    magnitude_mask<decltype(type)><<<(unsigned)tiles, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    return cudaGetLastError();
  });
}
