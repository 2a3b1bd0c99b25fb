// bias + quick_gelu on the device. Interfaces: include/mvl/launch.h.
#include "mvl/activation.cuh"
#include "mvl/launch.h"

namespace mvl {
namespace {

template <class T>
int forward(const void* x, const void* bias, void* out, int64_t rows, int64_t cols, cudaStream_t stream) {
  const BiasQuickGelu<T> body{static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(out)};
  return launch_sweep(body, rows, cols, nullptr, stream);
}

template <class T>
int backward(
    const void* grad, const void* x, const void* bias, void* grad_x, void* grad_bias, float* partials, int64_t rows,
    int64_t cols, cudaStream_t stream) {
  const BiasQuickGeluBackward<T> body{
      static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(grad_x)};
  if (const int status = launch_sweep(body, rows, cols, partials, stream)) return status;
  const Totals<T, 1> totals{{static_cast<T*>(grad_bias)}};
  return launch_totals(partials, sweep_chunks(rows, cols, kWidth<T>), cols, totals, stream);
}

}  // namespace
}  // namespace mvl

extern "C" int mvl_bias_quick_gelu(
    int format, const void* x, const void* bias, void* out, int64_t rows, int64_t cols, cudaStream_t stream) {
  return MVL_BY_FORMAT(format, mvl::forward, x, bias, out, rows, cols, stream);
}

extern "C" int mvl_bias_quick_gelu_backward(
    int format, const void* grad, const void* x, const void* bias, void* grad_x, void* grad_bias, float* partials,
    int64_t rows, int64_t cols, cudaStream_t stream) {
  return MVL_BY_FORMAT(
      format, mvl::backward, grad, x, bias, grad_x, grad_bias, partials, rows, cols, stream);
}
