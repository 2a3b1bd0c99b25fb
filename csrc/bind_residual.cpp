// torch.ops.megatron_vl.scale_residual and scale_residual_norm with their backward passes, on CPU and CUDA.
#include "mvl/binding.h"
#include "mvl/residual.cuh"

namespace mvl {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Matrix checked(const Tensor& x, const Tensor& bias, const Tensor& gamma) {
  const Matrix shape(x);
  check_like(x, x, "x");
  shape.check_columns(bias, x, "bias");
  shape.check_columns(gamma, x, "gamma");
  return shape;
}

void check_width(const Matrix& shape, const Tensor& x) {
  STD_TORCH_CHECK(
      shape.cols / width_of(x) <= kMostLanes, "megatron_vl::scale_residual_norm: rows of at most ",
      kMostLanes * width_of(x), " values in this format");
}

std::vector<int64_t> leading(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

template <class T>
void host_forward(
    const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& residual, const Tensor& out,
    const Matrix& shape) {
  const ScaleResidual<T> body{input<T>(x), input<T>(bias), input<T>(gamma), input<T>(residual), output<T>(out)};
  host_sweep(body, shape.rows, shape.cols, nullptr);
}

template <class T>
void host_backward(
    const Tensor& grad, const Tensor& x, const Tensor& bias, const Tensor& gamma, const Three& grads,
    const Matrix& shape) {
  const auto& [grad_x, grad_bias, grad_gamma] = grads;
  const ScaleResidualBackward<T> body{
      input<T>(grad), input<T>(x), input<T>(bias), input<T>(gamma), output<T>(grad_x)};
  T* totals[] = {output<T>(grad_bias), output<T>(grad_gamma)};
  host_sweep(body, shape.rows, shape.cols, totals);
}

Tensor forward_cpu(const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& residual) {
  const Matrix shape = checked(x, bias, gamma);
  check_twin(residual, x, "residual");
  Tensor out = torch::stable::empty_like(x);
  MVL_BY_FORMAT(format_of(x), host_forward, x, bias, gamma, residual, out, shape);
  return out;
}

Three empty_grads(const Tensor& x, const Tensor& bias) {
  return {torch::stable::empty_like(x), torch::stable::empty_like(bias), torch::stable::empty_like(bias)};
}

Three backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& bias, const Tensor& gamma) {
  const Matrix shape = checked(x, bias, gamma);
  check_twin(grad, x, "grad");
  Three grads = empty_grads(x, bias);
  MVL_BY_FORMAT(format_of(x), host_backward, grad, x, bias, gamma, grads, shape);
  return grads;
}

// --- with the norm

template <class T>
void host_norm_forward(
    const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& residual, const Tensor& weight,
    const Tensor& shift, double eps, const Four& out, const Matrix& shape) {
  const auto& [y, normed, mean, rstd] = out;
  const ScaleResidualNorm<T> body{
      input<T>(x),      input<T>(bias), input<T>(gamma),   input<T>(residual),  input<T>(weight),    input<T>(shift),
      output<T>(y), output<T>(normed), output<float>(mean), output<float>(rstd), static_cast<float>(eps)};
  host_scale_residual_norm(body, shape.rows, shape.cols);
}

template <class T>
void host_norm_backward(
    const Tensor& grad_y, const Tensor& grad_normed, const Tensor& x, const Tensor& bias, const Tensor& gamma,
    const Tensor& weight, const Tensor& y, const Tensor& mean, const Tensor& rstd, const Six& grads,
    const Matrix& shape) {
  const auto& [grad_x, grad_bias, grad_gamma, grad_residual, grad_weight, grad_shift] = grads;
  const ScaleResidualNormBackward<T> body{
      input<T>(grad_y), input<T>(grad_normed), input<T>(x),      input<T>(bias),   input<T>(gamma), input<T>(weight),
      input<T>(y),      input<float>(mean),    input<float>(rstd), output<T>(grad_x), output<T>(grad_residual)};
  T* totals[] = {output<T>(grad_bias), output<T>(grad_gamma), output<T>(grad_weight), output<T>(grad_shift)};
  host_scale_residual_norm_backward(body, shape.rows, shape.cols, totals);
}

Four norm_outputs(const Tensor& x) {
  return {
      torch::stable::empty_like(x), torch::stable::empty_like(x), empty_floats(x, leading(x)),
      empty_floats(x, leading(x))};
}

Matrix norm_checked(
    const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& weight) {
  const Matrix shape = checked(x, bias, gamma);
  check_width(shape, x);
  shape.check_columns(weight, x, "weight");
  return shape;
}

Four norm_forward_cpu(
    const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& residual, const Tensor& weight,
    const Tensor& shift, double eps) {
  const Matrix shape = norm_checked(x, bias, gamma, weight);
  check_twin(residual, x, "residual");
  shape.check_columns(shift, x, "shift");
  Four out = norm_outputs(x);
  MVL_BY_FORMAT(format_of(x), host_norm_forward, x, bias, gamma, residual, weight, shift, eps, out, shape);
  return out;
}

Matrix norm_backward_checked(
    const Tensor& grad_y, const Tensor& grad_normed, const Tensor& x, const Tensor& bias, const Tensor& gamma,
    const Tensor& weight, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const Matrix shape = norm_checked(x, bias, gamma, weight);
  check_twin(grad_y, x, "grad_y");
  check_twin(grad_normed, x, "grad_normed");
  check_twin(y, x, "y");
  check_floats(mean, x, shape.rows, "mean");
  check_floats(rstd, x, shape.rows, "rstd");
  return shape;
}

Six norm_grads(const Tensor& x, const Tensor& bias) {
  using torch::stable::empty_like;
  return {empty_like(x), empty_like(bias), empty_like(bias), empty_like(x), empty_like(bias), empty_like(bias)};
}

Six norm_backward_cpu(
    const Tensor& grad_y, const Tensor& grad_normed, const Tensor& x, const Tensor& bias, const Tensor& gamma,
    const Tensor& weight, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const Matrix shape = norm_backward_checked(grad_y, grad_normed, x, bias, gamma, weight, y, mean, rstd);
  Six grads = norm_grads(x, bias);
  MVL_BY_FORMAT(
      format_of(x), host_norm_backward, grad_y, grad_normed, x, bias, gamma, weight, y, mean, rstd, grads, shape);
  return grads;
}

#ifndef MVL_HOST_ONLY

using torch::stable::accelerator::DeviceGuard;

Tensor forward_cuda(const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& residual) {
  const Matrix shape = checked(x, bias, gamma);
  check_twin(residual, x, "residual");
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  check_launch(
      mvl_scale_residual(
          format_of(x), x.const_data_ptr(), bias.const_data_ptr(), gamma.const_data_ptr(), residual.const_data_ptr(),
          out.mutable_data_ptr(), shape.rows, shape.cols, current_stream(x)),
      "scale_residual");
  return out;
}

Three backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& bias, const Tensor& gamma) {
  const Matrix shape = checked(x, bias, gamma);
  check_twin(grad, x, "grad");
  const DeviceGuard guard(x.get_device_index());
  Three grads = empty_grads(x, bias);
  const auto& [grad_x, grad_bias, grad_gamma] = grads;
  const Tensor partials = empty_floats(x, {sweep_partials(shape.rows, shape.cols, width_of(x), 2)});
  check_launch(
      mvl_scale_residual_backward(
          format_of(x), grad.const_data_ptr(), x.const_data_ptr(), bias.const_data_ptr(), gamma.const_data_ptr(),
          grad_x.mutable_data_ptr(), grad_bias.mutable_data_ptr(), grad_gamma.mutable_data_ptr(),
          output<float>(partials), shape.rows, shape.cols, current_stream(x)),
      "scale_residual_backward");
  return grads;
}

Four norm_forward_cuda(
    const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& residual, const Tensor& weight,
    const Tensor& shift, double eps) {
  const Matrix shape = norm_checked(x, bias, gamma, weight);
  check_twin(residual, x, "residual");
  shape.check_columns(shift, x, "shift");
  const DeviceGuard guard(x.get_device_index());
  Four out = norm_outputs(x);
  const auto& [y, normed, mean, rstd] = out;
  check_launch(
      mvl_scale_residual_norm(
          format_of(x), x.const_data_ptr(), bias.const_data_ptr(), gamma.const_data_ptr(), residual.const_data_ptr(),
          weight.const_data_ptr(), shift.const_data_ptr(), y.mutable_data_ptr(), normed.mutable_data_ptr(),
          output<float>(mean), output<float>(rstd), static_cast<float>(eps), shape.rows, shape.cols,
          current_stream(x)),
      "scale_residual_norm");
  return out;
}

Six norm_backward_cuda(
    const Tensor& grad_y, const Tensor& grad_normed, const Tensor& x, const Tensor& bias, const Tensor& gamma,
    const Tensor& weight, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const Matrix shape = norm_backward_checked(grad_y, grad_normed, x, bias, gamma, weight, y, mean, rstd);
  const DeviceGuard guard(x.get_device_index());
  Six grads = norm_grads(x, bias);
  const auto& [grad_x, grad_bias, grad_gamma, grad_residual, grad_weight, grad_shift] = grads;
  void* const columns[] = {
      grad_bias.mutable_data_ptr(), grad_gamma.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
      grad_shift.mutable_data_ptr()};
  const Tensor partials = empty_floats(x, {norm_partials(shape.rows, shape.cols)});
  check_launch(
      mvl_scale_residual_norm_backward(
          format_of(x), grad_y.const_data_ptr(), grad_normed.const_data_ptr(), x.const_data_ptr(),
          bias.const_data_ptr(), gamma.const_data_ptr(), weight.const_data_ptr(), y.const_data_ptr(),
          input<float>(mean), input<float>(rstd), grad_x.mutable_data_ptr(), grad_residual.mutable_data_ptr(), columns,
          output<float>(partials), shape.rows, shape.cols, current_stream(x)),
      "scale_residual_norm_backward");
  return grads;
}

#endif  // MVL_HOST_ONLY

}  // namespace
}  // namespace mvl

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_vl, m) {
  m.def("scale_residual(Tensor x, Tensor bias, Tensor gamma, Tensor residual) -> Tensor");
  m.def("scale_residual_backward(Tensor grad, Tensor x, Tensor bias, Tensor gamma) -> (Tensor, Tensor, Tensor)");
  m.def(
      "scale_residual_norm(Tensor x, Tensor bias, Tensor gamma, Tensor residual, Tensor weight, Tensor shift, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "scale_residual_norm_backward(Tensor grad_y, Tensor grad_normed, Tensor x, Tensor bias, Tensor gamma, "
      "Tensor weight, Tensor y, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CPU, m) {
  m.impl("scale_residual", TORCH_BOX(&mvl::forward_cpu));
  m.impl("scale_residual_backward", TORCH_BOX(&mvl::backward_cpu));
  m.impl("scale_residual_norm", TORCH_BOX(&mvl::norm_forward_cpu));
  m.impl("scale_residual_norm_backward", TORCH_BOX(&mvl::norm_backward_cpu));
}

#ifndef MVL_HOST_ONLY
STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CUDA, m) {
  m.impl("scale_residual", TORCH_BOX(&mvl::forward_cuda));
  m.impl("scale_residual_backward", TORCH_BOX(&mvl::backward_cuda));
  m.impl("scale_residual_norm", TORCH_BOX(&mvl::norm_forward_cuda));
  m.impl("scale_residual_norm_backward", TORCH_BOX(&mvl::norm_backward_cuda));
}
#endif
