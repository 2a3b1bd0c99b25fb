// Bytes -> normalised patches on the device. Interfaces: include/mvl/launch.h.
#include "mvl/launch.h"
#include "mvl/patches.cuh"

namespace mvl {
namespace {

constexpr int kLanes = 160;  // the 147 groups of a released patch in whole warps

// A block writes the patches (y, 0 ...) of one view: the rows of bytes that it reads stay in its first-level cache.
template <class T>
__global__ void __launch_bounds__(kLanes) patchify_kernel(const Patchify<T> body) {
  const int across = body.width / body.patch;
  for (int x = 0; x < across; ++x) {
    for (int at = threadIdx.x; at < body.row_groups(); at += kLanes) body(blockIdx.y, blockIdx.x, x, at);
  }
}

template <class T>
int patchify(
    const uint8_t* pixels, const float* mean, const float* deviation, void* out, int n, int height, int width, int patch,
    cudaStream_t stream) {
  if (n == 0) return static_cast<int>(cudaSuccess);
  const Patchify<T> body{pixels, mean, deviation, static_cast<T*>(out), n, height, width, patch};
  patchify_kernel<T><<<dim3(height / patch, n), kLanes, 0, stream>>>(body);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace mvl

extern "C" int mvl_patchify(
    int format, const uint8_t* pixels, const float* mean, const float* deviation, void* out, int n, int height,
    int width, int patch, cudaStream_t stream) {
  return MVL_BY_FORMAT(format, mvl::patchify, pixels, mean, deviation, out, n, height, width, patch, stream);
}
