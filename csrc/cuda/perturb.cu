/* perturb.cu - the launch of the CUDA kernel: one for a whole list of tensors, after that of the kernel which prepares
 * a sequence's terms.
 *
 * Belongs here: what the host does. Does not belong here: arithmetic and memory access (perturb.cuh). Nothing here
 * allocates, copies or waits, so that a launch can be captured in a CUDA graph.
 */
#include <cuda_runtime.h>

#include <type_traits>

#include "perturb.cuh"

namespace zo {
namespace cuda {

/* Registers: 6 blocks of 128 leave 80 for each thread, 5 leave 96; only the plainest kernel needs no more than 80. Even
 * 20 warps with 32 bytes each in flight are more than the 7 KB per multiprocessor that cover the latency of memory at 3
 * TB/s. In fp32 a 16-byte access fills half a sector, and more warps push the other half out before it is asked for: on
 * an H100 6 blocks reached 86 % of the copy bandwidth where the general kernel, with its 5, reached 95 %.
 */
template <class V>
constexpr int BLOCKS =
    V::FORM != ZO_LEAN && (V::ROUNDING == SEQUENCE || V::FORM == ZO_EXTENDED)
        ? 4 /* bound by instructions, and 96 registers would spill */
    : V::FORM == ZO_LEAN && V::KIND == ZO_GAUSSIAN && V::ROUNDING == ZO_NEAREST && !std::is_same_v<typename V::T, F32>
        ? 6
        : 5;

template <class V>
__global__ void __launch_bounds__(THREADS, BLOCKS<V>) perturb(const __grid_constant__ Launch launch) {
  __shared__ Shared shared;
  perturb_tile<typename V::T, V::KIND, V::ROUNDING, V::FORM>(launch, shared);
}

template <int KIND> __global__ void __launch_bounds__(THREADS) prepare(const __grid_constant__ zo_pass pass) {
  prepare_step<KIND>(pass, (int64_t)blockIdx.x * THREADS + threadIdx.x);
}

} // namespace cuda
} // namespace zo

extern "C" int zo_cuda_perturb(const zo_pass *pass, const zo_tensor *table, const uint32_t *map, int64_t tiles,
                               int64_t tile, int form, void *stream) {
  using namespace zo::cuda;
  if (tiles == 0) return 0;
  if (tiles < 0 || tiles > 0x7FFFFFFF || tile <= 0 || tile % SPAN || pass->dtype < ZO_F32 || pass->dtype > ZO_BF16 ||
      form < ZO_GENERAL || form > ZO_EXTENDED || (pass->first && form == ZO_EXTENDED)) {
    return cudaErrorInvalidValue;
  }
  const auto on_stream = static_cast<cudaStream_t>(stream);
  if (pass->first) {
    const int64_t most = pass->n_passes > pass->n_terms ? pass->n_passes : pass->n_terms;
    if ((most && !pass->scratch) || most > 0x7FFFFFFF) return cudaErrorInvalidValue;
    if (most) {
      const unsigned blocks = (unsigned)((most + THREADS - 1) / THREADS);
      const auto kernel = pass->kind == ZO_GAUSSIAN ? prepare<ZO_GAUSSIAN> : prepare<ZO_RADEMACHER>;
      kernel<<<blocks, THREADS, 0, on_stream>>>(*pass);
    }
  }
  Launch launch = {*pass, zo::schedule(pass->seed), zo::F_BASE, tile, table, reinterpret_cast<const uint2 *>(map)};
  return dispatch(*pass, form, [&](auto variant) -> int {
    perturb<decltype(variant)><<<(unsigned)tiles, THREADS, 0, on_stream>>>(launch);
    return cudaGetLastError();
  });
}

extern "C" int zo_cuda_status(void) {
  int devices = 0;
  return cudaGetDeviceCount(&devices);
}

extern "C" const char *zo_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
