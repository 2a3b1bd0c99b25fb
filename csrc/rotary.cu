// RoPE-2D on the device. Interfaces: include/mvl/launch.h.
#include "mvl/launch.h"
#include "mvl/rotary.cuh"

namespace mvl {
namespace {

constexpr int kLanes = 192;     // heads x packs of a patch at the released widths
constexpr int64_t kBlocks = 132 * 16;

// A block takes whole patches, one after the other; a lane keeps to its packs of a patch.
template <class T, class Body>
__global__ void __launch_bounds__(kLanes) rotate_kernel(const Body body) {
  const RotarySizes n = body.sizes;
  const int packs = static_cast<int>(n.d) / kWidth<T>;
  const int work = static_cast<int>(n.heads) * packs;
  for (int64_t token = blockIdx.x; token < n.s * n.b; token += gridDim.x) {
    const int64_t patch = token / n.b, view = token - patch * n.b;
    for (int at = threadIdx.x; at < work; at += kLanes) {
      const int head = at / packs;
      body(patch, view, head, static_cast<int64_t>(at - head * packs) * kWidth<T>);
    }
  }
}

template <class T, class Body>
int launch(const Body& body, cudaStream_t stream) {
  const int64_t tokens = body.sizes.s * body.sizes.b;
  if (tokens == 0) return static_cast<int>(cudaSuccess);
  rotate_kernel<T, Body><<<static_cast<unsigned>(smaller(tokens, kBlocks)), kLanes, 0, stream>>>(body);
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int apart(
    const void* qkv, const float* table, void* q, void* k, void* v, const int64_t* sizes, cudaStream_t stream) {
  const RotateApart<T> body{
      static_cast<const T*>(qkv), table, static_cast<T*>(q), static_cast<T*>(k), static_cast<T*>(v),
      {sizes[0], sizes[1], sizes[2], sizes[3]}};
  return launch<T>(body, stream);
}

template <class T>
int together(
    const void* q, const void* k, const void* v, const float* table, void* qkv, const int64_t* sizes,
    cudaStream_t stream) {
  const RotateTogether<T> body{
      static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), table, static_cast<T*>(qkv),
      {sizes[0], sizes[1], sizes[2], sizes[3]}};
  return launch<T>(body, stream);
}

}  // namespace
}  // namespace mvl

extern "C" int mvl_rope_2d(
    int format, const void* qkv, const float* table, void* q, void* k, void* v, const int64_t* sizes,
    cudaStream_t stream) {
  return MVL_BY_FORMAT(format, mvl::apart, qkv, table, q, k, v, sizes, stream);
}

extern "C" int mvl_rope_2d_backward(
    int format, const void* q, const void* k, const void* v, const float* table, void* qkv, const int64_t* sizes,
    cudaStream_t stream) {
  return MVL_BY_FORMAT(format, mvl::together, q, k, v, table, qkv, sizes, stream);
}
