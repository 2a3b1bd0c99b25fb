// torch.ops.megatron_vl.rope_2d and its backward, on CPU and CUDA.
#include "mvl/binding.h"
#include "mvl/rotary.cuh"

namespace mvl {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

RotarySizes checked(const Tensor& table, const Tensor& like, const RotarySizes& sizes) {
  STD_TORCH_CHECK(
      sizes.d > 0 && sizes.d % width_of(like) == 0,
      "megatron_vl::rope_2d: channels of a head must be a multiple of 16 bytes");
  check_floats(table, like, sizes.s * sizes.d, "table");
  return sizes;
}

RotarySizes apart_checked(const Tensor& qkv, const Tensor& table) {
  format_of(qkv);
  check_like(qkv, qkv, "qkv");
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(3) % 3 == 0, "megatron_vl::rope_2d: qkv must be [s, b, heads, 3 d]");
  return checked(table, qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3});
}

// q, k, v: [b, s, heads, d]
RotarySizes together_checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table) {
  format_of(q);
  STD_TORCH_CHECK(q.dim() == 4, "megatron_vl::rope_2d_backward: gradients must be [b, s, heads, d]");
  check_like(q, q, "q");
  check_twin(k, q, "k");
  check_twin(v, q, "v");
  return checked(table, q, {q.size(1), q.size(0), q.size(2), q.size(3)});
}

Three empty_apart(const Tensor& qkv, const RotarySizes& n) {
  const std::vector<int64_t> sizes{n.b, n.s, n.heads, n.d};
  return {
      torch::stable::new_empty(qkv, sizes), torch::stable::new_empty(qkv, sizes),
      torch::stable::new_empty(qkv, sizes)};
}

Tensor empty_together(const Tensor& q, const RotarySizes& n) {
  const std::vector<int64_t> sizes{n.s, n.b, n.heads, 3 * n.d};
  return torch::stable::new_empty(q, sizes);
}

template <class T>
void host_apart(const Tensor& qkv, const Tensor& table, const Three& out, const RotarySizes& sizes) {
  const auto& [q, k, v] = out;
  host_rotate<T>(
      RotateApart<T>{input<T>(qkv), input<float>(table), output<T>(q), output<T>(k), output<T>(v), sizes});
}

template <class T>
void host_together(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& qkv,
    const RotarySizes& sizes) {
  host_rotate<T>(
      RotateTogether<T>{input<T>(q), input<T>(k), input<T>(v), input<float>(table), output<T>(qkv), sizes});
}

Three forward_cpu(const Tensor& qkv, const Tensor& table) {
  const RotarySizes sizes = apart_checked(qkv, table);
  Three out = empty_apart(qkv, sizes);
  MVL_BY_FORMAT(format_of(qkv), host_apart, qkv, table, out, sizes);
  return out;
}

Tensor backward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table) {
  const RotarySizes sizes = together_checked(q, k, v, table);
  Tensor qkv = empty_together(q, sizes);
  MVL_BY_FORMAT(format_of(q), host_together, q, k, v, table, qkv, sizes);
  return qkv;
}

#ifndef MVL_HOST_ONLY

Three forward_cuda(const Tensor& qkv, const Tensor& table) {
  const RotarySizes n = apart_checked(qkv, table);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Three out = empty_apart(qkv, n);
  const auto& [q, k, v] = out;
  const int64_t sizes[] = {n.s, n.b, n.heads, n.d};
  check_launch(
      mvl_rope_2d(
          format_of(qkv), qkv.const_data_ptr(), input<float>(table), q.mutable_data_ptr(), k.mutable_data_ptr(),
          v.mutable_data_ptr(), sizes, current_stream(qkv)),
      "rope_2d");
  return out;
}

Tensor backward_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table) {
  const RotarySizes n = together_checked(q, k, v, table);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor qkv = empty_together(q, n);
  const int64_t sizes[] = {n.s, n.b, n.heads, n.d};
  check_launch(
      mvl_rope_2d_backward(
          format_of(q), q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), input<float>(table),
          qkv.mutable_data_ptr(), sizes, current_stream(q)),
      "rope_2d_backward");
  return qkv;
}

#endif  // MVL_HOST_ONLY

}  // namespace
}  // namespace mvl

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_vl, m) {
  m.def("rope_2d(Tensor qkv, Tensor table) -> (Tensor, Tensor, Tensor)");
  m.def("rope_2d_backward(Tensor q, Tensor k, Tensor v, Tensor table) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CPU, m) {
  m.impl("rope_2d", TORCH_BOX(&mvl::forward_cpu));
  m.impl("rope_2d_backward", TORCH_BOX(&mvl::backward_cpu));
}

#ifndef MVL_HOST_ONLY
STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CUDA, m) {
  m.impl("rope_2d", TORCH_BOX(&mvl::forward_cuda));
  m.impl("rope_2d_backward", TORCH_BOX(&mvl::backward_cuda));
}
#endif
