// quick_gelu(x + bias) = u * sigmoid(1.702 u), u = x + bias, and its gradients. x: [rows, cols], bias: [cols].
#pragma once

#include "mvl/sweep.cuh"

namespace mvl {

constexpr float kQuickGelu = 1.702f;

MVL_BODY float sigmoid(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return 1.0f / (1.0f + std::exp(-x));
#endif
}

MVL_BODY float quick_gelu(float u) { return u * sigmoid(kQuickGelu * u); }

// d quick_gelu(u) / du
MVL_BODY float quick_gelu_slope(float u) {
  const float s = sigmoid(kQuickGelu * u);
  return s * (1.0f + kQuickGelu * u * (1.0f - s));
}

template <class Format>
struct BiasQuickGelu {
  using T = Format;
  using Columns = Floats<T>;
  static constexpr int kSums = 0;
  const T* x;
  const T* bias;
  T* out;

  MVL_BODY Columns columns(int64_t col) const { return load_floats(bias + col); }

  MVL_BODY void row(const Columns& bias_of, int64_t offset, float (*)[kWidth<T>]) const {
    Floats<T> u = load_floats(x + offset);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) u.value[i] = quick_gelu(u.value[i] + bias_of.value[i]);
    store(out + offset, pack<T>(u));
  }
};

// Sum 0: gradient of the bias.
template <class Format>
struct BiasQuickGeluBackward {
  using T = Format;
  using Columns = Floats<T>;
  static constexpr int kSums = 1;
  const T* grad;
  const T* x;
  const T* bias;
  T* grad_x;

  MVL_BODY Columns columns(int64_t col) const { return load_floats(bias + col); }

  MVL_BODY void row(const Columns& bias_of, int64_t offset, float (*sums)[kWidth<T>]) const {
    Floats<T> g = load_floats(grad + offset);
    const Floats<T> u = load_floats(x + offset);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      g.value[i] *= quick_gelu_slope(u.value[i] + bias_of.value[i]);
      sums[0][i] += g.value[i];
    }
    store(grad_x + offset, pack<T>(g));
  }
};

}  // namespace mvl
