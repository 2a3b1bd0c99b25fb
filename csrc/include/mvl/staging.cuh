// Records of 144 bytes between registers and device memory through shared memory: a warp's 32 records are contiguous
// there, a lane's own packs are not, and 16-byte accesses 144 bytes apart would use half of every sector.
#pragma once

#include "mvl/hopper.cuh"
#include "mvl/window.cuh"

namespace mvl {

constexpr int kWarp = 32;
constexpr int kStagingThreads = 128;

// Records of one warp. A stride of 9 packs is odd, so 8 lanes hit 8 different groups of four banks.
template <class T>
struct Staging {
  Pack<T> pack[kWarp * kTaps];
};

// `count` records of the warp, contiguous from `to`; lane i < count holds record i.
template <class T>
__device__ __forceinline__ void write_records(Staging<T>& staging, const Record<T>& record, T* to, int count) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
  MVL_UNROLL
  for (int t = 0; t < kTaps; ++t) staging.pack[lane * kTaps + t] = record.pack[t];
  __syncwarp();
  MVL_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    const int at = t * kWarp + lane;
    if (at < count * kTaps) store(to + static_cast<int64_t>(at) * kWidth<T>, staging.pack[at]);
  }
}

// Lane i < count gets record i of those from `from`; the others get zeros.
template <class T>
__device__ __forceinline__ Record<T> read_records(Staging<T>& staging, const T* from, int count) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
  MVL_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    const int at = t * kWarp + lane;
    const bool inside = at < count * kTaps;
    copy_16(shared_address(&staging.pack[at]), from + (inside ? static_cast<int64_t>(at) * kWidth<T> : 0), inside);
  }
  copies_commit();
  copies_wait<0>();
  __syncwarp();
  Record<T> record;
  MVL_UNROLL
  for (int t = 0; t < kTaps; ++t) record.pack[t] = staging.pack[lane * kTaps + t];
  return record;
}

}  // namespace mvl
