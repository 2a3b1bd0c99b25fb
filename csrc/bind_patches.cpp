// torch.ops.megatron_vl.patchify, on CPU and CUDA. It has no backward: pixels are bytes.
#include "mvl/binding.h"
#include "mvl/patches.cuh"

namespace mvl {
namespace {

struct Sizes {
  int n, height, width, patch;
};

Sizes checked(const Tensor& pixels, const Tensor& mean, const Tensor& deviation, int64_t patch) {
  STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Byte, "megatron_vl::patchify: pixels must be uint8");
  STD_TORCH_CHECK(
      pixels.dim() == 4 && pixels.size(1) == kColours && pixels.is_contiguous(),
      "megatron_vl::patchify: pixels must be [n, 3, height, width], contiguous");
  STD_TORCH_CHECK(
      patch > 0 && pixels.size(2) % patch == 0 && pixels.size(3) % patch == 0,
      "megatron_vl::patchify: height and width must be multiples of the patch");
  STD_TORCH_CHECK(
      kColours * patch * patch % kPatchGroup == 0, "megatron_vl::patchify: the side of a patch must be even");
  check_floats(mean, pixels, kColours, "mean");
  check_floats(deviation, pixels, kColours, "deviation");
  return {
      static_cast<int>(pixels.size(0)), static_cast<int>(pixels.size(2)), static_cast<int>(pixels.size(3)),
      static_cast<int>(patch)};
}

Tensor empty_patches(const Tensor& pixels, const Sizes& s, bool bfloat16) {
  const std::vector<int64_t> sizes{
      static_cast<int64_t>(s.height / s.patch) * (s.width / s.patch), s.n, kColours * s.patch * s.patch};
  return torch::stable::new_empty(pixels, sizes, bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
}

template <class T>
void host(const Tensor& pixels, const Tensor& mean, const Tensor& deviation, const Tensor& out, const Sizes& s) {
  host_patchify(Patchify<T>{
      input<uint8_t>(pixels), input<float>(mean), input<float>(deviation), output<T>(out), s.n, s.height, s.width,
      s.patch});
}

Tensor patchify_cpu(
    const Tensor& pixels, const Tensor& mean, const Tensor& deviation, int64_t patch, bool bfloat16) {
  const Sizes sizes = checked(pixels, mean, deviation, patch);
  Tensor out = empty_patches(pixels, sizes, bfloat16);
  MVL_BY_FORMAT(format_of(out), host, pixels, mean, deviation, out, sizes);
  return out;
}

#ifndef MVL_HOST_ONLY

Tensor patchify_cuda(
    const Tensor& pixels, const Tensor& mean, const Tensor& deviation, int64_t patch, bool bfloat16) {
  const Sizes s = checked(pixels, mean, deviation, patch);
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  Tensor out = empty_patches(pixels, s, bfloat16);
  check_launch(
      mvl_patchify(
          format_of(out), input<uint8_t>(pixels), input<float>(mean), input<float>(deviation), out.mutable_data_ptr(),
          s.n, s.height, s.width, s.patch, current_stream(pixels)),
      "patchify");
  return out;
}

#endif  // MVL_HOST_ONLY

}  // namespace
}  // namespace mvl

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_vl, m) {
  m.def("patchify(Tensor pixels, Tensor mean, Tensor deviation, int patch, bool bfloat16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CPU, m) { m.impl("patchify", TORCH_BOX(&mvl::patchify_cpu)); }

#ifndef MVL_HOST_ONLY
STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CUDA, m) { m.impl("patchify", TORCH_BOX(&mvl::patchify_cuda)); }
#endif
