// Layer scale + residual on the device, alone and with the LayerNorm behind it. Interfaces: include/mvl/launch.h.
#include "mvl/launch.h"
#include "mvl/residual.cuh"

namespace mvl {
namespace {

constexpr int kLargestTeam = kMostLanes / 32;  // in warps

// Sum over the lanes of the block, the same on all of them. Two buffers used in turn need one barrier per sum: a lane
// is at most one sum ahead of another.
struct Team {
  float (*shared)[kLargestTeam];
  int turn = 0;

  __device__ float sum(float value) {
    MVL_UNROLL
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    const int warps = static_cast<int>(blockDim.x) / 32;
    float* buffer = shared[turn];
    turn ^= 1;
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += buffer[w];
    return total;
  }
};

// Rows of a block: blockIdx.x, blockIdx.x + gridDim.x, ... The next row is read while the sums of one are waited for.
template <class T>
__global__ void __launch_bounds__(kMostLanes)
    norm_forward_kernel(const ScaleResidualNorm<T> body, int64_t rows, int64_t cols) {
  using Body = ScaleResidualNorm<T>;
  __shared__ float shared[2][kLargestTeam];
  Team team{shared};
  const int64_t col = static_cast<int64_t>(threadIdx.x) * kWidth<T>;
  const bool inside = col < cols;
  const float share = 1.0f / static_cast<float>(cols);
  typename Body::Columns at{};
  typename Body::Row ahead{};
  if (inside) {
    at = body.columns(col);
    ahead = body.read(blockIdx.x * cols + col);
  }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t offset = row * cols + col;
    const typename Body::Row now = ahead;
    if (inside && row + gridDim.x < rows) ahead = body.read(offset + gridDim.x * cols);
    Floats<T> values{};
    const float mean = team.sum(inside ? body.sum(at, now, offset, values) : 0.0f) * share;
    const float squares = team.sum(inside ? Body::centre(mean, values) : 0.0f);
    const float scale = inverse_root(squares * share + body.eps);
    if (inside) body.write(at, offset, scale, values);
    if (threadIdx.x == 0) body.statistics(row, mean, scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostLanes)
    norm_backward_kernel(const ScaleResidualNormBackward<T> body, int64_t rows, int64_t cols, float* partials) {
  using Body = ScaleResidualNormBackward<T>;
  __shared__ float shared[2][kLargestTeam];
  Team team{shared};
  const int64_t col = static_cast<int64_t>(threadIdx.x) * kWidth<T>;
  const bool inside = col < cols;
  const float share = 1.0f / static_cast<float>(cols);
  typename Body::Columns at{};
  if (inside) at = body.columns(col);
  float sums[Body::kSums][kWidth<T>] = {};
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t offset = row * cols + col;
    typename Body::Row now{};
    typename Body::Values values{};
    Pair part{0.0f, 0.0f};
    if (inside) {
      now = body.read(row, offset);
      part = body.sum(at, now, values, sums);
    }
    const float first = team.sum(part.first), second = team.sum(part.second);
    if (inside) body.write(at, now, offset, {first * share, second * share}, values, sums);
  }
  if (inside) {
    MVL_UNROLL
    for (int s = 0; s < Body::kSums; ++s) {
      MVL_UNROLL
      for (int i = 0; i < kWidth<T>; ++i) {
        partials[(static_cast<int64_t>(s) * gridDim.x + blockIdx.x) * cols + col + i] = sums[s][i];
      }
    }
  }
}

// Lanes of a team: one per pack of a row, whole warps.
template <class T>
unsigned team_size(int64_t cols) {
  return static_cast<unsigned>(ceil_div(cols / kWidth<T>, 32) * 32);
}

template <class T>
int forward(
    const void* x, const void* bias, const void* gamma, const void* residual, void* out, int64_t rows, int64_t cols,
    cudaStream_t stream) {
  const ScaleResidual<T> body{
      static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<const T*>(gamma),
      static_cast<const T*>(residual), static_cast<T*>(out)};
  return launch_sweep(body, rows, cols, nullptr, stream);
}

template <class T>
int backward(
    const void* grad, const void* x, const void* bias, const void* gamma, void* grad_x, void* grad_bias,
    void* grad_gamma, float* partials, int64_t rows, int64_t cols, cudaStream_t stream) {
  const ScaleResidualBackward<T> body{
      static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(bias),
      static_cast<const T*>(gamma), static_cast<T*>(grad_x)};
  if (const int status = launch_sweep(body, rows, cols, partials, stream)) return status;
  const Totals<T, 2> totals{{static_cast<T*>(grad_bias), static_cast<T*>(grad_gamma)}};
  return launch_totals(partials, sweep_chunks(rows, cols, kWidth<T>), cols, totals, stream);
}

template <class T>
int norm_forward(
    const void* x, const void* bias, const void* gamma, const void* residual, const void* weight, const void* shift,
    void* y, void* normed, float* mean, float* rstd, float eps, int64_t rows, int64_t cols, cudaStream_t stream) {
  if (rows == 0) return static_cast<int>(cudaSuccess);
  const ScaleResidualNorm<T> body{
      static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<const T*>(gamma),
      static_cast<const T*>(residual), static_cast<const T*>(weight), static_cast<const T*>(shift),
      static_cast<T*>(y), static_cast<T*>(normed), mean, rstd, eps};
  const unsigned teams = static_cast<unsigned>(smaller(rows, kNormForwardTeams));
  norm_forward_kernel<T><<<teams, team_size<T>(cols), 0, stream>>>(body, rows, cols);
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int norm_backward(
    const void* grad_y, const void* grad_normed, const void* x, const void* bias, const void* gamma,
    const void* weight, const void* y, const float* mean, const float* rstd, void* grad_x, void* grad_residual,
    void* const* grads, float* partials, int64_t rows, int64_t cols, cudaStream_t stream) {
  const ScaleResidualNormBackward<T> body{
      static_cast<const T*>(grad_y), static_cast<const T*>(grad_normed), static_cast<const T*>(x),
      static_cast<const T*>(bias), static_cast<const T*>(gamma), static_cast<const T*>(weight),
      static_cast<const T*>(y), mean, rstd, static_cast<T*>(grad_x), static_cast<T*>(grad_residual)};
  const int64_t teams = norm_backward_chunks(rows);
  if (rows > 0) {
    norm_backward_kernel<T><<<static_cast<unsigned>(teams), team_size<T>(cols), 0, stream>>>(
        body, rows, cols, partials);
    if (const int status = static_cast<int>(cudaGetLastError())) return status;
  }
  const Totals<T, 4> totals{
      {static_cast<T*>(grads[0]), static_cast<T*>(grads[1]), static_cast<T*>(grads[2]), static_cast<T*>(grads[3])}};
  return launch_totals(partials, teams, cols, totals, stream);
}

}  // namespace
}  // namespace mvl

extern "C" int mvl_scale_residual(
    int format, const void* x, const void* bias, const void* gamma, const void* residual, void* out, int64_t rows,
    int64_t cols, cudaStream_t stream) {
  return MVL_BY_FORMAT(format, mvl::forward, x, bias, gamma, residual, out, rows, cols, stream);
}

extern "C" int mvl_scale_residual_backward(
    int format, const void* grad, const void* x, const void* bias, const void* gamma, void* grad_x, void* grad_bias,
    void* grad_gamma, float* partials, int64_t rows, int64_t cols, cudaStream_t stream) {
  return MVL_BY_FORMAT(
      format, mvl::backward, grad, x, bias, gamma, grad_x, grad_bias, grad_gamma, partials, rows, cols, stream);
}

extern "C" int mvl_scale_residual_norm(
    int format, const void* x, const void* bias, const void* gamma, const void* residual, const void* weight,
    const void* shift, void* y, void* normed, float* mean, float* rstd, float eps, int64_t rows, int64_t cols,
    cudaStream_t stream) {
  return MVL_BY_FORMAT(
      format, mvl::norm_forward, x, bias, gamma, residual, weight, shift, y, normed, mean, rstd, eps, rows, cols,
      stream);
}

extern "C" int mvl_scale_residual_norm_backward(
    int format, const void* grad_y, const void* grad_normed, const void* x, const void* bias, const void* gamma,
    const void* weight, const void* y, const float* mean, const float* rstd, void* grad_x, void* grad_residual,
    void* const* grads, float* partials, int64_t rows, int64_t cols, cudaStream_t stream) {
  return MVL_BY_FORMAT(
      format, mvl::norm_backward, grad_y, grad_normed, x, bias, gamma, weight, y, mean, rstd, grad_x, grad_residual,
      grads, partials, rows, cols, stream);
}
