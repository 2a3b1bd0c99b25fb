// The C interface between the kernels (*.cu) and their bindings (bind_*.cpp): raw pointers, sizes, a stream.
//
// All functions return 0 or a cudaError_t. format: mvl::Format of all tensors that are not said to be something else.
// Tensors are contiguous and start at multiples of 16 bytes; cols is a multiple of 16 bytes.
// partials: fp32 workspace of mvl::sweep_partials(rows, cols, 16 / bytes per element, sums) values.
#pragma once

#include <cstdint>

#include "mvl/core.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
typedef struct CUstream_st* cudaStream_t;
#endif

#define MVL_BY_FORMAT(format, function, ...) \
  ((format) == mvl::kBFloat16 ? function<mvl::bf16>(__VA_ARGS__) : function<float>(__VA_ARGS__))

extern "C" {

const char* mvl_error_text(int status);

int mvl_bias_quick_gelu(
    int format, const void* x, const void* bias, void* out, int64_t rows, int64_t cols, cudaStream_t stream);

int mvl_bias_quick_gelu_backward(
    int format, const void* grad, const void* x, const void* bias, void* grad_x, void* grad_bias, float* partials,
    int64_t rows, int64_t cols, cudaStream_t stream);

int mvl_scale_residual(
    int format, const void* x, const void* bias, const void* gamma, const void* residual, void* out, int64_t rows,
    int64_t cols, cudaStream_t stream);

int mvl_scale_residual_backward(
    int format, const void* grad, const void* x, const void* bias, const void* gamma, void* grad_x, void* grad_bias,
    void* grad_gamma, float* partials, int64_t rows, int64_t cols, cudaStream_t stream);

int mvl_scale_residual_norm(
    int format, const void* x, const void* bias, const void* gamma, const void* residual, const void* weight,
    const void* shift, void* y, void* normed, float* mean, float* rstd, float eps, int64_t rows, int64_t cols,
    cudaStream_t stream);

// grads: of bias, gamma, weight, shift, an array on the host. partials: of mvl::norm_partials(rows, cols) values.
int mvl_scale_residual_norm_backward(
    int format, const void* grad_y, const void* grad_normed, const void* x, const void* bias, const void* gamma,
    const void* weight, const void* y, const float* mean, const float* rstd, void* grad_x, void* grad_residual,
    void* const* grads, float* partials, int64_t rows, int64_t cols, cudaStream_t stream);

// sizes: s, b, heads, d, an array on the host.
int mvl_rope_2d(
    int format, const void* qkv, const float* table, void* q, void* k, void* v, const int64_t* sizes,
    cudaStream_t stream);

int mvl_rope_2d_backward(
    int format, const void* q, const void* k, const void* v, const float* table, void* qkv, const int64_t* sizes,
    cudaStream_t stream);

// format: of out.
int mvl_patchify(
    int format, const uint8_t* pixels, const float* mean, const float* deviation, void* out, int n, int height,
    int width, int patch, cudaStream_t stream);

}  // extern "C"
