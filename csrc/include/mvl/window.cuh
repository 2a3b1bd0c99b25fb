// Windows of a 3x3, stride-2, padding-1 convolution over a square grid of tokens, in token layout.
//
// tokens: element (position, view, channel) at position * position_stride + view * view_stride + channel; positions
// are row-major on a grid of side `grid`. operand: [out_grid^2, views, channels * 9], the 9 taps of a channel stand
// together as in the weight of Conv2d, so that neither the weight nor its gradient is ever packed anew.
//
// One lane owns a pack of channels (16 bytes): with its 9 taps a record of 144 bytes, contiguous in the operand. A
// slice is one pack of channels of one view; slices of a position are consecutive, so a warp's records are, too.
#pragma once

#include "mvl/core.cuh"

namespace mvl {

constexpr int kTaps = 9;
constexpr int kCentre = 4;

template <class T>
struct Record {
  Pack<T> pack[kTaps];
};

// Pack t holds the channels of tap t -> as in the operand, channel by channel.
template <class T>
MVL_BODY Record<T> by_channel(const Record<T>& by_tap) {
  constexpr int width = kWidth<T>;
  Record<T> out;
  MVL_UNROLL
  for (int c = 0; c < width; ++c) {
    MVL_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      out.pack[(c * kTaps + t) / width].value[(c * kTaps + t) % width] = by_tap.pack[t].value[c];
    }
  }
  return out;
}

// The channels of tap t of a record of the operand.
template <class T>
MVL_BODY Pack<T> tap_of(const Record<T>& record, int t) {
  constexpr int width = kWidth<T>;
  Pack<T> out;
  MVL_UNROLL
  for (int c = 0; c < width; ++c) {
    out.value[c] = record.pack[(c * kTaps + t) / width].value[(c * kTaps + t) % width];
  }
  return out;
}

struct WindowShape {
  int grid, out_grid, views, channels;
  int64_t position_stride, view_stride;  // of the tokens, in elements

  MVL_BODY int packs(int width) const { return channels / width; }
  MVL_BODY int slices(int width) const { return views * packs(width); }
  MVL_BODY int64_t token(int y, int x, int slice, int width) const {
    const int view = slice / packs(width), pack = slice - view * packs(width);
    return (static_cast<int64_t>(y) * grid + x) * position_stride + view * view_stride +
           static_cast<int64_t>(pack) * width;
  }
};

template <class T>
struct Gather {
  WindowShape shape;
  const T* tokens;

  // What slice of output position (y, x) reads, outside of the grid 0.
  MVL_BODY Record<T> record(int y, int x, int slice) const {
    Record<T> taps;
    const T* centre = tokens + shape.token(2 * y, 2 * x, slice, kWidth<T>);
    MVL_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      const int dy = t / 3 - 1, dx = t % 3 - 1, row = 2 * y + dy, column = 2 * x + dx;
      const bool inside = row >= 0 && row < shape.grid && column >= 0 && column < shape.grid;
      if (inside) {
        taps.pack[t] = load(centre + (static_cast<int64_t>(dy) * shape.grid + dx) * shape.position_stride);
      } else {
        taps.pack[t] = pack<T>(Floats<T>{});
      }
    }
    return by_channel(taps);
  }
};

// Output columns that a lane of the fold walks along; each record of a row is then read for two rows of tokens only.
constexpr int kWalk = 7;

// The transpose of Gather as a gather: what a token's gradient is the sum of. Along a line of output positions (a, b)
// the tokens (2a, 2b) and (2a + 1, 2b) are complete with column b; (2a, 2b - 1) and (2a + 1, 2b - 1) are with column
// b, too, and carry what column b - 1 gave them.
template <class T>
struct Fold {
  Floats<T> carried[2], even[2];

  MVL_BODY static void add(Floats<T>& sum, const Record<T>& record, int t) {
    const Floats<T> more = unpack(tap_of(record, t));
    MVL_UNROLL
    for (int c = 0; c < kWidth<T>; ++c) sum.value[c] += more.value[c];
  }

  MVL_BODY void start() { carried[0] = carried[1] = even[0] = even[1] = Floats<T>{}; }

  // here: the record of (a, b). Tokens of column 2b - 1 are complete after below() and before next().
  MVL_BODY void here(const Record<T>& record, Floats<T> (&next)[2]) {
    even[0] = even[1] = next[0] = next[1] = Floats<T>{};
    add(carried[0], record, 3);
    add(carried[1], record, 6);
    add(even[0], record, 4);
    add(even[1], record, 7);
    add(next[0], record, 5);
    add(next[1], record, 8);
  }

  // below: the record of (a + 1, b), where there is one.
  MVL_BODY void below(const Record<T>& record, Floats<T> (&next)[2]) {
    add(carried[1], record, 0);
    add(even[1], record, 1);
    add(next[1], record, 2);
  }
};

template <class T>
MVL_BODY void store_token(T* tokens, const WindowShape& shape, int y, int x, int slice, const Floats<T>& sum) {
  if (y < shape.grid && x < shape.grid) store(tokens + shape.token(y, x, slice, kWidth<T>), pack<T>(sum));
}

// One lane's walk from output column `first` on line a. read(row, column): the record of that output position.
template <class T, class Read>
MVL_BODY void fold_walk(const WindowShape& shape, T* tokens, int a, int first, int slice, bool lives, const Read& read) {
  Fold<T> fold;
  fold.start();
  const int last = static_cast<int>(smaller(first + kWalk, shape.out_grid));
  for (int b = first; b <= last && b < shape.out_grid; ++b) {
    Floats<T> next[2];
    fold.here(read(a, b), next);
    if (a + 1 < shape.out_grid) fold.below(read(a + 1, b), next);
    if (lives) {
      MVL_UNROLL
      for (int p = 0; p < 2; ++p) {
        if (b > first) store_token(tokens, shape, 2 * a + p, 2 * b - 1, slice, fold.carried[p]);
        if (b < last) store_token(tokens, shape, 2 * a + p, 2 * b, slice, fold.even[p]);
      }
    }
    fold.carried[0] = next[0];
    fold.carried[1] = next[1];
  }
  if (lives && last == shape.out_grid) {  // the last column of an even grid has no window to its right
    MVL_UNROLL
    for (int p = 0; p < 2; ++p) store_token(tokens, shape, 2 * a + p, 2 * last - 1, slice, fold.carried[p]);
  }
}

}  // namespace mvl
