// torch.ops.megatron_vl.bias_quick_gelu and its backward, on CPU and CUDA.
#include "mvl/activation.cuh"
#include "mvl/binding.h"

namespace mvl {
namespace {

Matrix checked(const Tensor& x, const Tensor& bias) {
  const Matrix shape(x);
  check_like(x, x, "x");
  shape.check_columns(bias, x, "bias");
  return shape;
}

template <class T>
void host_forward(const Tensor& x, const Tensor& bias, const Tensor& out, const Matrix& shape) {
  host_sweep(BiasQuickGelu<T>{input<T>(x), input<T>(bias), output<T>(out)}, shape.rows, shape.cols, nullptr);
}

template <class T>
void host_backward(
    const Tensor& grad, const Tensor& x, const Tensor& bias, const Tensor& grad_x, const Tensor& grad_bias,
    const Matrix& shape) {
  const BiasQuickGeluBackward<T> body{input<T>(grad), input<T>(x), input<T>(bias), output<T>(grad_x)};
  T* totals[] = {output<T>(grad_bias)};
  host_sweep(body, shape.rows, shape.cols, totals);
}

Tensor forward_cpu(const Tensor& x, const Tensor& bias) {
  const Matrix shape = checked(x, bias);
  Tensor out = torch::stable::empty_like(x);
  MVL_BY_FORMAT(format_of(x), host_forward, x, bias, out, shape);
  return out;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& bias) {
  const Matrix shape = checked(x, bias);
  check_twin(grad, x, "grad");
  Tensor grad_x = torch::stable::empty_like(x), grad_bias = torch::stable::empty_like(bias);
  MVL_BY_FORMAT(format_of(x), host_backward, grad, x, bias, grad_x, grad_bias, shape);
  return {grad_x, grad_bias};
}

#ifndef MVL_HOST_ONLY

Tensor forward_cuda(const Tensor& x, const Tensor& bias) {
  const Matrix shape = checked(x, bias);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  check_launch(
      mvl_bias_quick_gelu(
          format_of(x), x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(), shape.rows, shape.cols,
          current_stream(x)),
      "bias_quick_gelu");
  return out;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& bias) {
  const Matrix shape = checked(x, bias);
  check_twin(grad, x, "grad");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor grad_x = torch::stable::empty_like(x), grad_bias = torch::stable::empty_like(bias);
  const Tensor partials = empty_floats(x, {sweep_partials(shape.rows, shape.cols, width_of(x), 1)});
  check_launch(
      mvl_bias_quick_gelu_backward(
          format_of(x), grad.const_data_ptr(), x.const_data_ptr(), bias.const_data_ptr(), grad_x.mutable_data_ptr(),
          grad_bias.mutable_data_ptr(), output<float>(partials), shape.rows, shape.cols,
          current_stream(x)),
      "bias_quick_gelu_backward");
  return {grad_x, grad_bias};
}

#endif  // MVL_HOST_ONLY

}  // namespace
}  // namespace mvl

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_vl, m) {
  m.def("bias_quick_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_quick_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CPU, m) {
  m.impl("bias_quick_gelu", TORCH_BOX(&mvl::forward_cpu));
  m.impl("bias_quick_gelu_backward", TORCH_BOX(&mvl::backward_cpu));
}

#ifndef MVL_HOST_ONLY
STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CUDA, m) {
  m.impl("bias_quick_gelu", TORCH_BOX(&mvl::forward_cuda));
  m.impl("bias_quick_gelu_backward", TORCH_BOX(&mvl::backward_cuda));
}
#endif
