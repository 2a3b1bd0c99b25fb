// Element-wise work on [rows, cols] with parameters per column, and sums over rows for their gradients.
//
// A lane owns one pack of columns (its parameters stay in registers) and walks down the rows of its chunk. Sums over
// rows: fp32 partials [sums][chunks][cols], then a second pass in a fixed order, without atomics. The cut into
// chunks follows from the shape alone, so that a result does not depend on the machine.
//
// A Body has: type T, class Columns, constant kSums, and
//   Columns columns(int64_t col) const
//   void row(const Columns&, int64_t offset, float (*sums)[kWidth<T>]) const     // offset of the pack in [rows, cols]
#pragma once

#include "mvl/core.cuh"

namespace mvl {

constexpr int kSweepLanes = 32;   // packs of columns per block
constexpr int kSweepRows = 8;     // rows that a block works on at once
constexpr int kSweepBlocks = 1056;  // 8 for each of a Hopper GPU's 132 multiprocessors

MVL_BODY int64_t sweep_column_blocks(int64_t cols, int width) { return ceil_div(cols / width, kSweepLanes); }

// Chunks of rows for a tensor [rows, cols] of 16 / width bytes per element.
MVL_BODY int64_t sweep_chunks(int64_t rows, int64_t cols, int width) {
  const int64_t wanted = ceil_div(kSweepBlocks, sweep_column_blocks(cols, width));
  return smaller(wanted, ceil_div(rows, kSweepRows));
}

// fp32 values of the partial sums.
MVL_BODY int64_t sweep_partials(int64_t rows, int64_t cols, int width, int sums) {
  return sums * sweep_chunks(rows, cols, width) * cols;
}

#ifdef __CUDACC__

template <class Body>
__global__ void __launch_bounds__(kSweepLanes* kSweepRows)
    sweep_kernel(const Body body, int64_t rows, int64_t cols, int64_t rows_per_chunk, float* partials) {
  using T = typename Body::T;
  constexpr int width = kWidth<T>;
  constexpr int sums_held = Body::kSums ? Body::kSums : 1;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kSweepLanes + threadIdx.x) * width;
  const bool inside = col < cols;
  const int64_t first = blockIdx.y * rows_per_chunk;
  const int64_t last = smaller(first + rows_per_chunk, rows);
  float sums[sums_held][width] = {};
  if (inside) {
    const typename Body::Columns columns = body.columns(col);
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < last; row += kSweepRows) {
      body.row(columns, row * cols + col, sums);
    }
  }
  if constexpr (Body::kSums > 0) {
    __shared__ float shared[kSweepRows][kSweepLanes * width];
    MVL_UNROLL
    for (int s = 0; s < Body::kSums; ++s) {
      MVL_UNROLL
      for (int i = 0; i < width; ++i) shared[threadIdx.y][i * kSweepLanes + threadIdx.x] = sums[s][i];
      __syncthreads();
      if (inside && threadIdx.y < width) {  // width <= kSweepRows: each row of lanes adds up one element of the packs
        float total = 0.0f;
        MVL_UNROLL
        for (int r = 0; r < kSweepRows; ++r) total += shared[r][threadIdx.y * kSweepLanes + threadIdx.x];
        partials[(static_cast<int64_t>(s) * gridDim.y + blockIdx.y) * cols + col + threadIdx.y] = total;
      }
      __syncthreads();
    }
  }
}

// out[s][col] = sum over chunks of partials[s][chunk][col].
template <class T, int kSums>
struct Totals {
  T* out[kSums];
};

template <class T, int kSums>
__global__ void __launch_bounds__(kSweepLanes* kSweepRows)
    totals_kernel(const float* partials, int64_t chunks, int64_t cols, const Totals<T, kSums> totals) {
  __shared__ float shared[kSweepRows][kSweepLanes];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSweepLanes + threadIdx.x;
  MVL_UNROLL
  for (int s = 0; s < kSums; ++s) {
    float total = 0.0f;
    if (col < cols) {
#pragma unroll 4
      for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSweepRows) {
        total += partials[(s * chunks + chunk) * cols + col];
      }
    }
    shared[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && col < cols) {
      float sum = 0.0f;
      MVL_UNROLL
      for (int r = 0; r < kSweepRows; ++r) sum += shared[r][threadIdx.x];
      totals.out[s][col] = from_float<T>(sum);
    }
    __syncthreads();
  }
}

template <class T, int kSums>
int launch_totals(
    const float* partials, int64_t chunks, int64_t cols, const Totals<T, kSums>& totals, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kSweepLanes)));
  totals_kernel<T, kSums><<<grid, dim3(kSweepLanes, kSweepRows), 0, stream>>>(partials, chunks, cols, totals);
  return static_cast<int>(cudaGetLastError());
}

template <class Body>
int launch_sweep(const Body& body, int64_t rows, int64_t cols, float* partials, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return static_cast<int>(cudaSuccess);
  constexpr int width = kWidth<typename Body::T>;
  const int64_t chunks = sweep_chunks(rows, cols, width);
  const dim3 grid(static_cast<unsigned>(sweep_column_blocks(cols, width)), static_cast<unsigned>(chunks));
  sweep_kernel<<<grid, dim3(kSweepLanes, kSweepRows), 0, stream>>>(
      body, rows, cols, ceil_div(rows, chunks), partials);
  return static_cast<int>(cudaGetLastError());
}

#endif  // __CUDACC__

// The same on the CPU. totals: kSums rows of cols values, fp32; sums are taken in double.
template <class Body>
void host_sweep(const Body& body, int64_t rows, int64_t cols, typename Body::T* const* totals) {
  using T = typename Body::T;
  constexpr int width = kWidth<T>;
  constexpr int sums_held = Body::kSums ? Body::kSums : 1;
  for (int64_t col = 0; col < cols; col += width) {
    const typename Body::Columns columns = body.columns(col);
    double total[sums_held][width] = {};
    for (int64_t row = 0; row < rows; ++row) {
      float sums[sums_held][width] = {};
      body.row(columns, row * cols + col, sums);
      for (int s = 0; s < Body::kSums; ++s) {
        for (int i = 0; i < width; ++i) total[s][i] += sums[s][i];
      }
    }
    for (int s = 0; s < Body::kSums; ++s) {
      for (int i = 0; i < width; ++i) totals[s][col + i] = from_float<T>(static_cast<float>(total[s][i]));
    }
  }
}

}  // namespace mvl
