// What the bindings share. Only PyTorch's stable ABI is used (TORCH_TARGET_VERSION forbids the rest), so that one
// library serves torch 2.11 and newer, and Python 3.11 and newer.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "mvl/launch.h"

namespace mvl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int format_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::BFloat16 || type == ScalarType::Float, "megatron_vl: takes bfloat16 and float32");
  return type == ScalarType::BFloat16 ? kBFloat16 : kFloat32;
}

inline int width_of(const Tensor& x) { return 16 / static_cast<int>(x.element_size()); }

template <class T>
const T* input(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Contiguous, on the device of `like`, starting at a multiple of 16 bytes.
inline void check_place(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), "megatron_vl: ", name,
      " is on another device");
  STD_TORCH_CHECK(x.is_contiguous(), "megatron_vl: ", name, " must be contiguous");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "megatron_vl: ", name,
      " must start at a multiple of 16 bytes");
}

// The same, and in the format of `like`.
inline void check_like(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "megatron_vl: ", name, " has another format");
  check_place(x, like, name);
}

// The same, and in the shape of `like`.
inline void check_twin(const Tensor& x, const Tensor& like, const char* name) {
  check_like(x, like, name);
  STD_TORCH_CHECK(same_sizes(x, like), "megatron_vl: ", name, " has another shape");
}

// The same as check_place, and fp32 with `count` values.
inline void check_floats(const Tensor& x, const Tensor& like, int64_t count, const char* name) {
  check_place(x, like, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "megatron_vl: ", name, " must be float32");
  STD_TORCH_CHECK(x.numel() == count, "megatron_vl: ", name, " must have ", count, " values");
}

// [..., cols] as rows x cols.
struct Matrix {
  int64_t rows, cols;

  explicit Matrix(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 1, "megatron_vl: takes tensors of at least one dimension");
    cols = x.size(x.dim() - 1);
    STD_TORCH_CHECK(
        cols > 0 && cols % width_of(x) == 0, "megatron_vl: the last dimension must be a multiple of 16 bytes");
    rows = x.numel() / cols;
  }

  // One value per column, in the format of `like`.
  void check_columns(const Tensor& x, const Tensor& like, const char* name) const {
    check_like(x, like, name);
    STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == cols, "megatron_vl: ", name, " must have one value per column");
  }
};

inline Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

#ifndef MVL_HOST_ONLY

// The stream that PyTorch launches on. The function lives in libtorch_cuda, which this library is not linked to so
// that it loads beside CPU builds, and which Python does not load into the global scope: it is asked for by name.
inline cudaStream_t current_stream(const Tensor& x) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, "megatron_vl: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, "megatron_vl::", op, ": ", mvl_error_text(status));
}

#endif  // MVL_HOST_ONLY

}  // namespace mvl
