// Implicit GEMMs of the projector's convolutions on Hopper. Never run on a GPU: written and compiled without one; all
// index maths (implicit.cuh, pack.cuh) is tested on the CPU, and chosen only where it is asked for.
//
// One warpgroup copies (gathered rows by cp.async, packed weights by one bulk copy per step), two multiply with wgmma,
// four stages of shared memory between them. A copying thread waits for its own copies two steps later, makes them
// visible to wgmma and only then signals: no ordering is left to the hardware's favour.
#include "mvl/hopper.cuh"
#include "mvl/pack.cuh"
#include "mvl/projector.h"
#include "mvl/staging.cuh"

namespace mvl {
namespace {

constexpr int kLag = 2;  // steps between issuing copies and signalling them
constexpr int kAlignment = 1024;  // of a swizzled image
constexpr int kSharedBytes = kStages * kStageBytes + kAlignment + 2 * kStages * 8;
constexpr int kConsumerWarps = 8;

// Addresses in shared memory.
struct Stages {
  uint32_t images, full, empty;

  __device__ __forceinline__ explicit Stages(const void* shared) {
    images = (shared_address(shared) + kAlignment - 1) & ~static_cast<uint32_t>(kAlignment - 1);
    full = images + kStages * kStageBytes;
    empty = full + kStages * 8;
  }
  __device__ __forceinline__ uint32_t image(int step) const { return images + step % kStages * kStageBytes; }
  __device__ __forceinline__ uint32_t full_of(int step) const { return full + step % kStages * 8; }
  __device__ __forceinline__ uint32_t empty_of(int step) const { return empty + step % kStages * 8; }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + s * 8, kCopyThreads);
        barrier_init(empty + s * 8, kConsumerWarps);
      }
      barrier_init_done();
    }
    __syncthreads();
  }
};

__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 7), 0); }

// Until the multiplying warps have left the stage of this step.
__device__ __forceinline__ void wait_empty(const Stages& stages, int step) {
  if (step >= kStages) barrier_wait(stages.empty_of(step), (step / kStages - 1) & 1);
}

// After the copies of `step` were issued: signals those of kLag steps before.
__device__ __forceinline__ void signal_behind(const Stages& stages, int step) {
  copies_commit();
  if (step >= kLag) {
    copies_wait<kLag>();
    fence_shared_for_async();
    barrier_arrive(stages.full_of(step - kLag));
  }
}

__device__ __forceinline__ void signal_rest(const Stages& stages, int steps) {
  copies_wait<0>();
  fence_shared_for_async();
  for (int step = steps > kLag ? steps - kLag : 0; step < steps; ++step) barrier_arrive(stages.full_of(step));
}

// 64 rows x 256 columns of a tile, all steps. The first product overwrites the sums: any other instruction that wrote
// them would make ptxas wait after every product (its note C7515). So does a product in flight over the end of a step
// when the left operand lies across the sum (C7514, nvcc 13.0): wgrad waits once per step, and the other warpgroup
// multiplies meanwhile.
template <int kAcrossRows, int kAcrossColumns>
__device__ __forceinline__ void multiply(const Stages& stages, int steps, int group, float (&sums)[kSums]) {
  constexpr Operand rows = kAcrossRows ? kAcross : kAlong, columns = kAcrossColumns ? kAcross : kAlong;
  constexpr int kInFlight = kAcrossRows ? 0 : 1;
  int step = 0;
  do {
    barrier_wait(stages.full_of(step), (step / kStages) & 1);
    const uint32_t image = stages.image(step);
    const uint64_t a = descriptor(image + group * kSegment, rows), b = descriptor(image + kRowsBytes, columns);
    products_fence();
    MVL_UNROLL
    for (int k = 0; k < kStep / 16; ++k) {
      product_64x256x16<kAcrossRows, kAcrossColumns>(
          sums, a + k * (rows.advance >> 4), b + k * (columns.advance >> 4), step + k);
    }
    products_commit();
    products_wait<kInFlight>();
    if (step >= kInFlight && threadIdx.x % kWarp == 0) barrier_arrive(stages.empty_of(step - kInFlight));
  } while (++step < steps);
  products_wait<0>();
  pin(sums);
}

// source: rows of source_channels; packed: images; target: rows of target_channels.
template <int kAcrossColumns>
MVL_GEMM_KERNEL void __launch_bounds__(kThreads, 1) conv_kernel(
    const __grid_constant__ Tiles tiles, const bf16* source, int source_channels, const bf16* packed,
    const bf16* bias, bf16* target, int target_channels) {
  extern __shared__ uint8_t shared[];
  const Stages stages(shared);
  stages.init();
  const Tile tile = tile_at(tiles, blockIdx.x);
  const Dense& dense = tiles.problem[tile.problem];
  const int group = warpgroup(), thread = threadIdx.x & 127, steps = dense.taps * tiles.steps_per_tap;
  if (group == 0) {
    GatheredRow rows[kRowCopies];
    MVL_UNROLL
    for (int i = 0; i < kRowCopies; ++i) rows[i] = gathered_row(dense, tile.row * kTileRows + copied_line(thread, i));
    int t = 0, part = 0;
    for (int step = 0; step < steps; ++step) {
      wait_empty(stages, step);
      const uint32_t image = stages.image(step);
      if (thread == 0) {
        barrier_expect_bytes(stages.full_of(step), kColumnsBytes);
        copy_bulk(
            image + kRowsBytes, packed + packed_image(tiles, tile.column, dense.tap[t], part), kColumnsBytes,
            stages.full_of(step));
      }
      const int away = tap_rows(dense, t);
      MVL_UNROLL
      for (int i = 0; i < kRowCopies; ++i) {
        const Copy copy = row_copy(rows[i], thread, i, t, away, part * kStep, source_channels);
        copy_16(image + copy.to, source + copy.from, copy.inside);
      }
      signal_behind(stages, step);
      if (++part == tiles.steps_per_tap) part = 0, ++t;
    }
    signal_rest(stages, steps);
  } else {
    float sums[kSums];
    multiply<0, kAcrossColumns>(stages, steps, group - 1, sums);
    store_rows(
        dense, tile.row * kTileRows + (group - 1) * 64, tile.column * kTileColumns, thread, sums, bias, target,
        target_channels);
  }
}

MVL_GEMM_KERNEL void __launch_bounds__(kThreads, 1) wgrad_kernel(
    const __grid_constant__ Dense dense, const ConvShape shape, const bf16* grad, const bf16* tokens, bf16* by_tap) {
  extern __shared__ uint8_t shared[];
  const Stages stages(shared);
  stages.init();
  const WgradTile tile = wgrad_tile_at(shape, blockIdx.x);
  const int group = warpgroup(), thread = threadIdx.x & 127;
  const int steps = static_cast<int>(ceil_div(dense.rows(), kStep));
  if (group == 0) {
    for (int step = 0; step < steps; ++step) {
      wait_empty(stages, step);
      const uint32_t image = stages.image(step);
      MVL_UNROLL
      for (int i = 0; i < kStepCopies; ++i) {
        const int row = step * kStep + copied_line(thread, i);
        const SummedRow summed = summed_row(dense, row, tile.tap);
        MVL_UNROLL
        for (int s = 0; s < kTileRows / kStep; ++s) {
          const Copy copy =
              line_copy(thread, i, s, summed.lives, row, tile.row * kTileRows, shape.out_channels);
          copy_16(image + copy.to, grad + copy.from, copy.inside);
        }
        MVL_UNROLL
        for (int s = 0; s < kTileColumns / kStep; ++s) {
          const Copy copy = line_copy(
              thread, i, s, summed.inside, summed.source, tile.column * kTileColumns, shape.in_channels);
          copy_16(image + kRowsBytes + copy.to, tokens + copy.from, copy.inside);
        }
      }
      signal_behind(stages, step);
    }
    signal_rest(stages, steps);
  } else {
    float sums[kSums];
    multiply<1, 1>(stages, steps, group - 1, sums);
    store_by_tap(
        shape, tile.tap, tile.row * kTileRows + (group - 1) * 64, tile.column * kTileColumns, thread, sums, by_tap);
  }
}

template <bool kForward>
__global__ void __launch_bounds__(kStagingThreads)
    pack_kernel(const ConvShape shape, const __grid_constant__ Tiles tiles, const bf16* weight, bf16* packed) {
  __shared__ Staging<bf16> staging[kStagingThreads / kWarp];
  const int warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStagingThreads + warp * kWarp;
  if (first >= weight_records(shape)) return;  // their number is a multiple of 32
  const Record<bf16> record = read_records(staging[warp], weight + first * (kTaps * 8), kWarp);
  pack_record<kForward>(shape, tiles, first + threadIdx.x % kWarp, record, packed);
}

__global__ void __launch_bounds__(kStagingThreads)
    unpack_kernel(const ConvShape shape, const bf16* by_tap, bf16* weight) {
  __shared__ Staging<bf16> staging[kStagingThreads / kWarp];
  const int warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStagingThreads + warp * kWarp;
  if (first >= weight_records(shape)) return;
  const Record<bf16> record = unpack_record(shape, first + threadIdx.x % kWarp, by_tap);
  write_records(staging[warp], record, weight + first * (kTaps * 8), kWarp);
}

unsigned record_blocks(const ConvShape& shape) {
  return static_cast<unsigned>(ceil_div(weight_records(shape), kStagingThreads));
}

template <class Kernel>
int allow_shared(Kernel kernel) {
  return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
}

template <bool kForward>
int conv(
    const ConvShape& shape, const Tiles& tiles, const void* source, int source_channels, const void* weight,
    const void* bias, void* packed, void* target, int target_channels, cudaStream_t stream) {
  const auto kernel = conv_kernel<kForward ? 0 : 1>;
  if (const int status = allow_shared(kernel)) return status;
  bf16* const images = static_cast<bf16*>(packed);
  pack_kernel<kForward><<<record_blocks(shape), kStagingThreads, 0, stream>>>(
      shape, tiles, static_cast<const bf16*>(weight), images);
  if (const int status = static_cast<int>(cudaGetLastError())) return status;
  kernel<<<tiles.first[kProblems], kThreads, kSharedBytes, stream>>>(
      tiles, static_cast<const bf16*>(source), source_channels, images, static_cast<const bf16*>(bias),
      static_cast<bf16*>(target), target_channels);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace mvl

extern "C" int mvl_projector_conv(
    const mvl::ConvShape* shape, const void* tokens, const void* weight, const void* bias, void* packed, void* out,
    cudaStream_t stream) {
  if (shape->out_rows() == 0) return 0;
  return mvl::conv<true>(
      *shape, mvl::forward_tiles(*shape), tokens, shape->in_channels, weight, bias, packed, out, shape->out_channels,
      stream);
}

extern "C" int mvl_projector_conv_dgrad(
    const mvl::ConvShape* shape, const void* grad, const void* weight, void* packed, void* tokens,
    cudaStream_t stream) {
  if (shape->out_rows() == 0) return 0;
  return mvl::conv<false>(
      *shape, mvl::dgrad_tiles(*shape), grad, shape->out_channels, weight, nullptr, packed, tokens,
      shape->in_channels, stream);
}

extern "C" int mvl_projector_conv_wgrad(
    const mvl::ConvShape* shape, const void* grad, const void* tokens, void* by_tap, void* weight,
    cudaStream_t stream) {
  using mvl::bf16;
  if (const int status = mvl::allow_shared(mvl::wgrad_kernel)) return status;
  mvl::wgrad_kernel<<<mvl::wgrad_tiles(*shape), mvl::kThreads, mvl::kSharedBytes, stream>>>(
      mvl::forward_problem(*shape), *shape, static_cast<const bf16*>(grad), static_cast<const bf16*>(tokens),
      static_cast<bf16*>(by_tap));
  if (const int status = static_cast<int>(cudaGetLastError())) return status;
  mvl::unpack_kernel<<<mvl::record_blocks(*shape), mvl::kStagingThreads, 0, stream>>>(
      *shape, static_cast<const bf16*>(by_tap), static_cast<bf16*>(weight));
  return static_cast<int>(cudaGetLastError());
}
