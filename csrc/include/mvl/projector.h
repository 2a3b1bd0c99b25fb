// The C interface of the projector's kernels. All functions return 0 or a cudaError_t.
//
// Tensors start at multiples of 16 bytes; strides are in elements and multiples of 16 bytes; channels are multiples
// of 16 bytes. The convolution is 3x3, stride 2, padding 1. weight: [out, in * 9], the released [out, in, 3, 3].
#pragma once

#include "mvl/implicit.cuh"
#include "mvl/launch.h"
#include "mvl/window.cuh"

extern "C" {

// operand[out_grid^2, views, channels * 9] of the tokens.
int mvl_projector_gather(
    int format, const mvl::WindowShape* shape, const void* tokens, void* operand, cudaStream_t stream);

// The tokens' gradient, every element written, of the operand's.
int mvl_projector_fold(
    int format, const mvl::WindowShape* shape, const void* operand, void* tokens, cudaStream_t stream);

// bf16 only from here on. Sizes: mvl::implicit_fits.

// out[out_grid^2 * views, out_channels]; bias may be null; packed: workspace of as many elements as the weight.
int mvl_projector_conv(
    const mvl::ConvShape* shape, const void* tokens, const void* weight, const void* bias, void* packed, void* out,
    cudaStream_t stream);

// grad: contiguous; tokens: contiguous.
int mvl_projector_conv_dgrad(
    const mvl::ConvShape* shape, const void* grad, const void* weight, void* packed, void* tokens,
    cudaStream_t stream);

// by_tap: workspace of as many elements as the weight.
int mvl_projector_conv_wgrad(
    const mvl::ConvShape* shape, const void* grad, const void* tokens, void* by_tap, void* weight,
    cudaStream_t stream);

}  // extern "C"
