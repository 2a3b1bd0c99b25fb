// Between the released layout of a weight, [out, in, 3, 3], and what the implicit kernels read and write. A record is
// 8 input channels of an output channel with their taps; records are contiguous in the released layout.
#pragma once

#include "mvl/implicit.cuh"

namespace mvl {

MVL_BODY int64_t weight_records(const ConvShape& shape) {
  return static_cast<int64_t>(shape.out_channels) * (shape.in_channels / 8);
}

struct RecordPlace {
  int o, c;
};

MVL_BODY RecordPlace record_place(const ConvShape& shape, int64_t record) {
  const int packs = shape.in_channels / 8;
  const int o = static_cast<int>(record / packs);
  return {o, static_cast<int>(record - static_cast<int64_t>(o) * packs) * 8};
}

// Which of the two packed forms: see packed_forward and packed_dgrad.
template <bool kForward>
MVL_BODY void pack_record(
    const ConvShape& shape, const Tiles& tiles, int64_t index, const Record<bf16>& record, bf16* packed) {
  const RecordPlace place = record_place(shape, index);
  MVL_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    const int64_t at = kForward ? packed_forward(tiles, place.o, place.c, t) : packed_dgrad(tiles, place.o, place.c, t);
    store(packed + at, tap_of(record, t));
  }
}

// The record of by_tap[tap][o][c] in the released order.
MVL_BODY Record<bf16> unpack_record(const ConvShape& shape, int64_t index, const bf16* by_tap) {
  const RecordPlace place = record_place(shape, index);
  Record<bf16> taps;
  MVL_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    taps.pack[t] =
        load(by_tap + (static_cast<int64_t>(t) * shape.out_channels + place.o) * shape.in_channels + place.c);
  }
  return by_channel(taps);
}

}  // namespace mvl
