// Windows of tokens into a GEMM operand and back. Never run on a GPU: written and compiled without one; the bodies
// (window.cuh) are tested on the CPU.
#include "mvl/projector.h"
#include "mvl/staging.cuh"

namespace mvl {
namespace {

// blockIdx: x packs of slices, y column, z line of the output grid.
template <class T>
__global__ void __launch_bounds__(kStagingThreads) gather_kernel(const Gather<T> gather, T* operand) {
  __shared__ Staging<T> staging[kStagingThreads / kWarp];
  const WindowShape& shape = gather.shape;
  const int slices = shape.slices(kWidth<T>), warp = threadIdx.x / kWarp;
  const int first = blockIdx.x * kStagingThreads + warp * kWarp, count = min(kWarp, slices - first);
  if (count <= 0) return;
  const int slice = min(first + static_cast<int>(threadIdx.x % kWarp), slices - 1);
  const Record<T> record = gather.record(blockIdx.z, blockIdx.y, slice);
  const int64_t position = static_cast<int64_t>(blockIdx.z) * shape.out_grid + blockIdx.y;
  T* to = operand + (position * slices + first) * (kTaps * kWidth<T>);
  write_records(staging[warp], record, to, count);
}

// blockIdx: x packs of slices, y walk, z line of the output grid.
template <class T>
__global__ void __launch_bounds__(kStagingThreads, 4) fold_kernel(const WindowShape shape, const T* operand, T* tokens) {
  __shared__ Staging<T> staging[kStagingThreads / kWarp];
  const int slices = shape.slices(kWidth<T>), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = blockIdx.x * kStagingThreads + warp * kWarp, count = min(kWarp, slices - first);
  if (count <= 0) return;
  const auto read = [&](int a, int b) {
    const int64_t position = static_cast<int64_t>(a) * shape.out_grid + b;
    return read_records(staging[warp], operand + (position * slices + first) * (kTaps * kWidth<T>), count);
  };
  fold_walk(shape, tokens, blockIdx.z, blockIdx.y * kWalk, min(first + lane, slices - 1), lane < count, read);
}

dim3 blocks(const WindowShape& shape, int width, int columns) {
  return dim3(
      static_cast<unsigned>(ceil_div(shape.slices(width), kStagingThreads)), static_cast<unsigned>(columns),
      static_cast<unsigned>(shape.out_grid));
}

template <class T>
int gather(const WindowShape& shape, const void* tokens, void* operand, cudaStream_t stream) {
  const Gather<T> body{shape, static_cast<const T*>(tokens)};
  gather_kernel<T><<<blocks(shape, kWidth<T>, shape.out_grid), kStagingThreads, 0, stream>>>(
      body, static_cast<T*>(operand));
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int fold(const WindowShape& shape, const void* operand, void* tokens, cudaStream_t stream) {
  const int walks = static_cast<int>(ceil_div(shape.out_grid, kWalk));
  fold_kernel<T><<<blocks(shape, kWidth<T>, walks), kStagingThreads, 0, stream>>>(
      shape, static_cast<const T*>(operand), static_cast<T*>(tokens));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace mvl

extern "C" int mvl_projector_gather(
    int format, const mvl::WindowShape* shape, const void* tokens, void* operand, cudaStream_t stream) {
  if (shape->views == 0) return 0;
  return MVL_BY_FORMAT(format, mvl::gather, *shape, tokens, operand, stream);
}

extern "C" int mvl_projector_fold(
    int format, const mvl::WindowShape* shape, const void* operand, void* tokens, cudaStream_t stream) {
  if (shape->views == 0) return 0;
  return MVL_BY_FORMAT(format, mvl::fold, *shape, operand, tokens, stream);
}
