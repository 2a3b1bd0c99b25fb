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

}  // extern "C"
