// The implicit GEMM kernels played on the CPU, thread by thread and byte by byte: the same tiles, copies, swizzles,
// descriptors and stores. Shared memory starts as NaN, so a byte that no copy brings spoils the result. What wgmma does
// with a descriptor and where it leaves its sums is written down here from the PTX ISA; it cannot be tested here.
#pragma once

#include <limits>
#include <vector>

#include "mvl/pack.cuh"

namespace mvl {

class HostStage {
 public:
  HostStage() : bytes_(kStageBytes) {}

  void poison() {
    for (size_t i = 0; i + 1 < bytes_.size(); i += 2) bytes_[i] = bytes_[i + 1] = 0xff;  // 0xffff is a NaN in bf16
  }

  void copy(int to, const bf16* from, bool inside, int bytes = 16) {
    STD_TORCH_CHECK(
        to >= 0 && to + bytes <= kStageBytes && to % 16 == 0, "megatron_vl: a copy leaves the stage, at ", to);
    if (inside) {
      std::memcpy(bytes_.data() + to, from, static_cast<size_t>(bytes));
    } else {
      std::memset(bytes_.data() + to, 0, static_cast<size_t>(bytes));
    }
  }

  // Element (mn, k) of the operand of one wgmma. Offsets that a descriptor holds are in units of 16 bytes; bits 4-6 of
  // an address are swizzled with bits 7-9.
  float operand(uint64_t descriptor, bool across, int mn, int k) const {
    const int start = static_cast<int>(descriptor & 0x3fff) << 4;
    const int leading = static_cast<int>((descriptor >> 16) & 0x3fff) << 4;
    const int stride = static_cast<int>((descriptor >> 32) & 0x3fff) << 4;
    STD_TORCH_CHECK(descriptor >> 62 == 1, "megatron_vl: a descriptor without the 128-byte swizzle");
    int at = start;
    if (across) {
      at += mn / 64 * leading + k / 8 * stride + k % 8 * kLine + mn % 64 * 2;
    } else {
      at += mn / 8 * stride + mn % 8 * kLine + k * 2;
    }
    at ^= ((at >> 7) & 7) << 4;
    bf16 value;
    std::memcpy(&value, bytes_.data() + at, sizeof(value));
    return to_float(value);
  }

 private:
  std::vector<uint8_t> bytes_;
};

// Accumulators of the two multiplying warpgroups.
class HostSums {
 public:
  HostSums() : sums_(static_cast<size_t>(kTileRows) * kTileColumns), right_(16 * kTileColumns) {}

  void clear() { std::fill(sums_.begin(), sums_.end(), 0.0f); }

  template <int kAcrossRows, int kAcrossColumns>
  void multiply(const HostStage& stage) {
    constexpr Operand rows = kAcrossRows ? kAcross : kAlong, columns = kAcrossColumns ? kAcross : kAlong;
    for (int k = 0; k < kStep / 16; ++k) {
      const uint64_t b = descriptor(kRowsBytes, columns) + k * (columns.advance >> 4);
      for (int i = 0; i < 16; ++i) {
        for (int n = 0; n < kTileColumns; ++n) right_[i * kTileColumns + n] = stage.operand(b, kAcrossColumns, n, i);
      }
      for (int group = 0; group < 2; ++group) {
        const uint64_t a = descriptor(group * kSegment, rows) + k * (rows.advance >> 4);
        for (int m = 0; m < 64; ++m) {
          float* sum = sums_.data() + (group * 64 + m) * kTileColumns;
          for (int i = 0; i < 16; ++i) {
            const float left = stage.operand(a, kAcrossRows, m, i);
            const float* right = right_.data() + i * kTileColumns;
            for (int n = 0; n < kTileColumns; ++n) sum[n] += left * right[n];
          }
        }
      }
    }
  }

  // What a thread of a warpgroup holds in registers.
  void of_thread(int group, int thread, float (&sums)[kSums]) const {
    for (int i = 0; i < kSums; ++i) {
      sums[i] = sums_[(group * 64 + sum_row(thread, i)) * kTileColumns + sum_column(thread, i)];
    }
  }

 private:
  std::vector<float> sums_, right_;
};

template <int kAcrossColumns>
void host_conv(
    const Tiles& tiles, const bf16* source, int source_channels, const bf16* packed, const bf16* bias, bf16* target,
    int target_channels) {
  HostStage stage;
  HostSums all;
  for (int index = 0; index < tiles.first[kProblems]; ++index) {
    const Tile tile = tile_at(tiles, index);
    const Dense& dense = tiles.problem[tile.problem];
    all.clear();
    for (int step = 0; step < dense.taps * tiles.steps_per_tap; ++step) {
      const int t = step / tiles.steps_per_tap, part = step % tiles.steps_per_tap;
      stage.poison();
      stage.copy(
          kRowsBytes, packed + packed_image(tiles, tile.column, dense.tap[t], part), true, kColumnsBytes);
      for (int thread = 0; thread < kCopyThreads; ++thread) {
        for (int i = 0; i < kRowCopies; ++i) {
          const GatheredRow row = gathered_row(dense, tile.row * kTileRows + copied_line(thread, i));
          const Copy copy = row_copy(row, thread, i, t, tap_rows(dense, t), part * kStep, source_channels);
          stage.copy(copy.to, source + copy.from, copy.inside);
        }
      }
      all.multiply<0, kAcrossColumns>(stage);
    }
    for (int group = 0; group < 2; ++group) {
      for (int thread = 0; thread < 128; ++thread) {
        float sums[kSums];
        all.of_thread(group, thread, sums);
        store_rows(
            dense, tile.row * kTileRows + group * 64, tile.column * kTileColumns, thread, sums, bias, target,
            target_channels);
      }
    }
  }
}

inline void host_wgrad(const ConvShape& shape, const bf16* grad, const bf16* tokens, bf16* by_tap) {
  const Dense dense = forward_problem(shape);
  HostStage stage;
  HostSums all;
  for (int index = 0; index < wgrad_tiles(shape); ++index) {
    const WgradTile tile = wgrad_tile_at(shape, index);
    const int row_channel = tile.row * kTileRows, column_channel = tile.column * kTileColumns;
    all.clear();
    for (int step = 0; step < ceil_div(dense.rows(), kStep); ++step) {
      stage.poison();
      for (int thread = 0; thread < kCopyThreads; ++thread) {
        for (int i = 0; i < kStepCopies; ++i) {
          const int row = step * kStep + copied_line(thread, i);
          const SummedRow summed = summed_row(dense, row, tile.tap);
          for (int s = 0; s < kTileRows / kStep; ++s) {
            const Copy copy = line_copy(thread, i, s, summed.lives, row, row_channel, shape.out_channels);
            stage.copy(copy.to, grad + copy.from, copy.inside);
          }
          for (int s = 0; s < kTileColumns / kStep; ++s) {
            const Copy copy =
                line_copy(thread, i, s, summed.inside, summed.source, column_channel, shape.in_channels);
            stage.copy(kRowsBytes + copy.to, tokens + copy.from, copy.inside);
          }
        }
      }
      all.multiply<1, 1>(stage);
    }
    for (int group = 0; group < 2; ++group) {
      for (int thread = 0; thread < 128; ++thread) {
        float sums[kSums];
        all.of_thread(group, thread, sums);
        store_by_tap(shape, tile.tap, row_channel + group * 64, column_channel, thread, sums, by_tap);
      }
    }
  }
}

template <bool kForward>
void host_pack(const ConvShape& shape, const Tiles& tiles, const bf16* weight, bf16* packed) {
  for (int64_t index = 0; index < weight_records(shape); ++index) {
    Record<bf16> record;
    std::memcpy(&record, weight + index * kTaps * 8, sizeof(record));
    pack_record<kForward>(shape, tiles, index, record, packed);
  }
}

inline void host_unpack(const ConvShape& shape, const bf16* by_tap, bf16* weight) {
  for (int64_t index = 0; index < weight_records(shape); ++index) {
    const Record<bf16> record = unpack_record(shape, index, by_tap);
    std::memcpy(weight + index * kTaps * 8, &record, sizeof(record));
  }
}

}  // namespace mvl
