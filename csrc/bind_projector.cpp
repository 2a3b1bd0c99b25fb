// torch.ops.megatron_vl.projector_*: windows of tokens and back, the implicit convolutions; on CPU and CUDA.
#include <algorithm>
#include <optional>

#include "mvl/binding.h"
#include "mvl/implicit_host.h"
#include "mvl/projector.h"

namespace mvl {
namespace {

int side_of(int64_t positions) {
  int64_t side = 0;
  while (side * side < positions) ++side;
  STD_TORCH_CHECK(side * side == positions, "megatron_vl: ", positions, " tokens are no square grid");
  return static_cast<int>(side);
}

void check_same(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      x.scalar_type() == like.scalar_type() && x.is_cuda() == like.is_cuda() &&
          x.get_device_index() == like.get_device_index(),
      "megatron_vl: ", name, " has another format or device");
}

// --- windows

// tokens: [grid^2, views, channels], views possibly a slice of more.
WindowShape window_shape(const Tensor& tokens) {
  format_of(tokens);
  STD_TORCH_CHECK(tokens.dim() == 3, "megatron_vl: tokens must be [positions, views, channels]");
  const int64_t width = width_of(tokens), channels = tokens.size(2);
  STD_TORCH_CHECK(
      channels > 0 && channels % width == 0 && (channels == 1 || tokens.stride(2) == 1) &&
          tokens.stride(0) % width == 0 && tokens.stride(1) % width == 0 &&
          reinterpret_cast<uintptr_t>(tokens.const_data_ptr()) % 16 == 0,
      "megatron_vl: the channels of a token must be contiguous multiples of 16 bytes at multiples of 16 bytes");
  STD_TORCH_CHECK(
      tokens.size(1) * channels < (int64_t{1} << 31), "megatron_vl: too many views and channels for one call");
  const int grid = side_of(tokens.size(0));
  STD_TORCH_CHECK(grid > 0 && grid < 65536, "megatron_vl: a grid of side ", grid);
  return {grid, (grid + 1) / 2, static_cast<int>(tokens.size(1)), static_cast<int>(channels), tokens.stride(0),
          tokens.stride(1)};
}

Tensor empty_operand(const Tensor& tokens, const WindowShape& shape) {
  const int64_t positions = static_cast<int64_t>(shape.out_grid) * shape.out_grid;
  return torch::stable::new_empty(tokens, {positions, shape.views, static_cast<int64_t>(shape.channels) * kTaps});
}

void check_operand(const Tensor& operand, const Tensor& tokens, const WindowShape& shape) {
  check_same(operand, tokens, "operand");
  STD_TORCH_CHECK(
      operand.dim() == 3 && operand.is_contiguous() &&
          operand.size(0) == static_cast<int64_t>(shape.out_grid) * shape.out_grid &&
          operand.size(1) == shape.views && operand.size(2) == static_cast<int64_t>(shape.channels) * kTaps &&
          reinterpret_cast<uintptr_t>(operand.const_data_ptr()) % 16 == 0,
      "megatron_vl: the operand must be contiguous [out positions, views, channels * 9]");
}

template <class T>
int host_gather(const WindowShape& shape, const void* tokens, void* operand) {
  const Gather<T> gather{shape, static_cast<const T*>(tokens)};
  const int slices = shape.slices(kWidth<T>);
  Record<T>* to = static_cast<Record<T>*>(operand);
  for (int y = 0; y < shape.out_grid; ++y) {
    for (int x = 0; x < shape.out_grid; ++x) {
      for (int slice = 0; slice < slices; ++slice) *to++ = gather.record(y, x, slice);
    }
  }
  return 0;
}

template <class T>
int host_fold(const WindowShape& shape, const void* operand, void* tokens) {
  const int slices = shape.slices(kWidth<T>);
  const Record<T>* records = static_cast<const Record<T>*>(operand);
  for (int a = 0; a < shape.out_grid; ++a) {
    for (int first = 0; first < shape.out_grid; first += kWalk) {
      for (int slice = 0; slice < slices; ++slice) {
        const auto read = [&](int row, int column) {
          return records[(static_cast<int64_t>(row) * shape.out_grid + column) * slices + slice];
        };
        fold_walk(shape, static_cast<T*>(tokens), a, first, slice, true, read);
      }
    }
  }
  return 0;
}

Tensor gather_cpu(const Tensor& tokens) {
  const WindowShape shape = window_shape(tokens);
  Tensor operand = empty_operand(tokens, shape);
  MVL_BY_FORMAT(format_of(tokens), host_gather, shape, tokens.const_data_ptr(), operand.mutable_data_ptr());
  return operand;
}

void fold_cpu(const Tensor& tokens, const Tensor& operand) {
  const WindowShape shape = window_shape(tokens);
  check_operand(operand, tokens, shape);
  MVL_BY_FORMAT(format_of(tokens), host_fold, shape, operand.const_data_ptr(), tokens.mutable_data_ptr());
}

// --- implicit convolutions

const bf16* data(const Tensor& x) { return static_cast<const bf16*>(x.const_data_ptr()); }

bf16* out_data(const Tensor& x) { return static_cast<bf16*>(x.mutable_data_ptr()); }

void check_bf16(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "megatron_vl: ", name, " must be bfloat16");
  check_like(x, like, name);
}

// positions: of the tokens.
ConvShape conv_shape(int64_t positions, int64_t views, int64_t in, int64_t out) {
  const ConvShape shape{side_of(positions), static_cast<int>(views), static_cast<int>(in), static_cast<int>(out)};
  STD_TORCH_CHECK(
      implicit_fits(shape), "megatron_vl: the implicit convolution takes channels in multiples of ", kTileColumns,
      " and fewer than 2^30 tokens, not ", in, " to ", out, " channels of ", positions * views, " tokens");
  return shape;
}

ConvShape forward_shape(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_bf16(tokens, tokens, "tokens");
  check_bf16(weight, tokens, "weight");
  STD_TORCH_CHECK(
      tokens.dim() == 3 && weight.dim() == 2 && weight.size(1) == tokens.size(2) * kTaps,
      "megatron_vl: tokens must be [positions, views, in] and the weight [out, in * 9]");
  if (bias) {
    check_bf16(*bias, tokens, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "megatron_vl: one bias per output channel");
  }
  return conv_shape(tokens.size(0), tokens.size(1), tokens.size(2), weight.size(0));
}

ConvShape dgrad_shape(const Tensor& grad, const Tensor& weight, int64_t grid) {
  check_bf16(grad, grad, "grad");
  check_bf16(weight, grad, "weight");
  STD_TORCH_CHECK(
      grad.dim() == 3 && weight.dim() == 2 && weight.size(0) == grad.size(2) && weight.size(1) % kTaps == 0 &&
          grad.size(0) == ((grid + 1) / 2) * ((grid + 1) / 2),
      "megatron_vl: grad must be [out positions, views, out] of that grid and the weight [out, in * 9]");
  return conv_shape(grid * grid, grad.size(1), weight.size(1) / kTaps, weight.size(0));
}

ConvShape wgrad_shape(const Tensor& grad, const Tensor& tokens) {
  check_bf16(tokens, tokens, "tokens");
  check_bf16(grad, tokens, "grad");
  STD_TORCH_CHECK(
      grad.dim() == 3 && tokens.dim() == 3 && grad.size(1) == tokens.size(1),
      "megatron_vl: grad and tokens must be [positions, views, channels]");
  const ConvShape shape = conv_shape(tokens.size(0), tokens.size(1), tokens.size(2), grad.size(2));
  STD_TORCH_CHECK(
      grad.size(0) == static_cast<int64_t>(shape.out_grid()) * shape.out_grid(), "megatron_vl: grad of another grid");
  return shape;
}

Tensor empty_tokens(const Tensor& like, int64_t positions, const ConvShape& shape, int64_t channels) {
  return torch::stable::new_empty(like, {positions, shape.views, channels});
}

int64_t out_positions(const ConvShape& shape) { return static_cast<int64_t>(shape.out_grid()) * shape.out_grid(); }

Tensor empty_weight(const Tensor& like, const ConvShape& shape) {
  return torch::stable::new_empty(like, {shape.out_channels, static_cast<int64_t>(shape.in_channels) * kTaps});
}

Tensor conv_cpu(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ConvShape shape = forward_shape(tokens, weight, bias);
  const Tiles tiles = forward_tiles(shape);
  Tensor packed = empty_weight(weight, shape), out = empty_tokens(tokens, out_positions(shape), shape, shape.out_channels);
  host_pack<true>(shape, tiles, data(weight), out_data(packed));
  host_conv<0>(
      tiles, data(tokens), shape.in_channels, data(packed), bias ? data(*bias) : nullptr, out_data(out),
      shape.out_channels);
  return out;
}

Tensor dgrad_cpu(const Tensor& grad, const Tensor& weight, int64_t grid) {
  const ConvShape shape = dgrad_shape(grad, weight, grid);
  const Tiles tiles = dgrad_tiles(shape);
  Tensor packed = empty_weight(weight, shape), tokens = empty_tokens(grad, grid * grid, shape, shape.in_channels);
  host_pack<false>(shape, tiles, data(weight), out_data(packed));
  host_conv<1>(
      tiles, data(grad), shape.out_channels, data(packed), nullptr, out_data(tokens), shape.in_channels);
  return tokens;
}

Tensor wgrad_cpu(const Tensor& grad, const Tensor& tokens) {
  const ConvShape shape = wgrad_shape(grad, tokens);
  Tensor by_tap = empty_weight(grad, shape), weight = empty_weight(grad, shape);
  host_wgrad(shape, data(grad), data(tokens), out_data(by_tap));
  host_unpack(shape, data(by_tap), out_data(weight));
  return weight;
}

#ifndef MVL_HOST_ONLY

using torch::stable::accelerator::DeviceGuard;

Tensor gather_cuda(const Tensor& tokens) {
  const WindowShape shape = window_shape(tokens);
  const DeviceGuard guard(tokens.get_device_index());
  Tensor operand = empty_operand(tokens, shape);
  check_launch(
      mvl_projector_gather(
          format_of(tokens), &shape, tokens.const_data_ptr(), operand.mutable_data_ptr(), current_stream(tokens)),
      "projector_gather");
  return operand;
}

void fold_cuda(const Tensor& tokens, const Tensor& operand) {
  const WindowShape shape = window_shape(tokens);
  check_operand(operand, tokens, shape);
  const DeviceGuard guard(tokens.get_device_index());
  check_launch(
      mvl_projector_fold(
          format_of(tokens), &shape, operand.const_data_ptr(), tokens.mutable_data_ptr(), current_stream(tokens)),
      "projector_fold_");
}

Tensor conv_cuda(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ConvShape shape = forward_shape(tokens, weight, bias);
  const DeviceGuard guard(tokens.get_device_index());
  Tensor packed = empty_weight(weight, shape), out = empty_tokens(tokens, out_positions(shape), shape, shape.out_channels);
  check_launch(
      mvl_projector_conv(
          &shape, tokens.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
          packed.mutable_data_ptr(), out.mutable_data_ptr(), current_stream(tokens)),
      "projector_conv");
  return out;
}

Tensor dgrad_cuda(const Tensor& grad, const Tensor& weight, int64_t grid) {
  const ConvShape shape = dgrad_shape(grad, weight, grid);
  const DeviceGuard guard(grad.get_device_index());
  Tensor packed = empty_weight(weight, shape), tokens = empty_tokens(grad, grid * grid, shape, shape.in_channels);
  check_launch(
      mvl_projector_conv_dgrad(
          &shape, grad.const_data_ptr(), weight.const_data_ptr(), packed.mutable_data_ptr(),
          tokens.mutable_data_ptr(), current_stream(grad)),
      "projector_conv_dgrad");
  return tokens;
}

Tensor wgrad_cuda(const Tensor& grad, const Tensor& tokens) {
  const ConvShape shape = wgrad_shape(grad, tokens);
  const DeviceGuard guard(grad.get_device_index());
  Tensor by_tap = empty_weight(grad, shape), weight = empty_weight(grad, shape);
  check_launch(
      mvl_projector_conv_wgrad(
          &shape, grad.const_data_ptr(), tokens.const_data_ptr(), by_tap.mutable_data_ptr(),
          weight.mutable_data_ptr(), current_stream(grad)),
      "projector_conv_wgrad");
  return weight;
}

#endif  // MVL_HOST_ONLY

}  // namespace
}  // namespace mvl

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_vl, m) {
  m.def("projector_gather(Tensor tokens) -> Tensor");
  m.def("projector_fold_(Tensor(a!) tokens, Tensor operand) -> ()");
  m.def("projector_conv(Tensor tokens, Tensor weight, Tensor? bias) -> Tensor");
  m.def("projector_conv_dgrad(Tensor grad, Tensor weight, int grid) -> Tensor");
  m.def("projector_conv_wgrad(Tensor grad, Tensor tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CPU, m) {
  m.impl("projector_gather", TORCH_BOX(&mvl::gather_cpu));
  m.impl("projector_fold_", TORCH_BOX(&mvl::fold_cpu));
  m.impl("projector_conv", TORCH_BOX(&mvl::conv_cpu));
  m.impl("projector_conv_dgrad", TORCH_BOX(&mvl::dgrad_cpu));
  m.impl("projector_conv_wgrad", TORCH_BOX(&mvl::wgrad_cpu));
}

#ifndef MVL_HOST_ONLY
STABLE_TORCH_LIBRARY_IMPL(megatron_vl, CUDA, m) {
  m.impl("projector_gather", TORCH_BOX(&mvl::gather_cuda));
  m.impl("projector_fold_", TORCH_BOX(&mvl::fold_cuda));
  m.impl("projector_conv", TORCH_BOX(&mvl::conv_cuda));
  m.impl("projector_conv_dgrad", TORCH_BOX(&mvl::dgrad_cuda));
  m.impl("projector_conv_wgrad", TORCH_BOX(&mvl::wgrad_cuda));
}
#endif
