// Index maths of the implicit GEMMs: everything that decides which byte goes where, for device and CPU alike.
//
// A 3x3, stride-2, padding-1 convolution on contiguous token layout, position-major:
//   forward  out[m, o]    = sum over (tap, c) of tokens[source(m, tap), c] * weight[o, c, tap]
//   dgrad    four dense problems, by the parity of the token's line and column: 1, 2, 2 and 4 of the taps reach it
//   wgrad    weight[o, c, tap] = sum over m of grad[m, o] * tokens[source(m, tap), c]
// Forward and dgrad gather one operand row by row (16-byte cp.async, zeros outside of the grid); the other operand is
// the weight, packed beforehand into images of shared-memory tiles, so that a tile is one bulk copy without a tensor
// map. wgrad gathers both operands and writes tap-major, which is turned afterwards.
//
// A tile is 128 x 256 with 64 summed elements per step. Images in shared memory have 128-byte lines whose 16-byte
// chunks are swizzled (chunk ^ line % 8), the layout "128B" of wgmma (PTX ISA, asynchronous warpgroup matrix
// instructions): along the sum, a line is a row of 64 summed elements; across, a line is one summed element of 64
// rows or columns.
#pragma once

#include "mvl/window.cuh"

namespace mvl {

constexpr int kTileRows = 128, kTileColumns = 256, kStep = 64;
constexpr int kLine = 128;                              // bytes of an image's line: 64 bf16
constexpr int kSegment = kStep * kLine;                 // bytes of 64 lines
constexpr int kRowsBytes = kTileRows * kStep * 2;       // image of the left operand
constexpr int kColumnsBytes = kTileColumns * kStep * 2;  // image of the right operand
constexpr int kStageBytes = kRowsBytes + kColumnsBytes;
constexpr int kStages = 4;
constexpr int kCopyThreads = 128;  // one warpgroup copies, two multiply 64 rows each
constexpr int kThreads = 3 * 128;
constexpr int kGroup = 16;  // row tiles that run side by side, so that operands are shared in the L2 cache

struct ConvShape {
  int grid, views, in_channels, out_channels;

  MVL_BODY int out_grid() const { return (grid + 1) / 2; }
  MVL_BODY int64_t out_rows() const { return static_cast<int64_t>(out_grid()) * out_grid() * views; }
};

// Sizes that the implicit kernels take.
MVL_BODY bool implicit_fits(const ConvShape& shape) {
  const int64_t most = static_cast<int64_t>(shape.grid) * shape.grid * shape.views;
  return shape.in_channels % kTileColumns == 0 && shape.out_channels % kTileColumns == 0 && most < (1 << 30);
}

// Byte offset of 16-byte chunk `chunk` of line `line` in an image.
MVL_BODY int swizzled(int line, int chunk) { return line * kLine + ((chunk ^ (line & 7)) << 4); }

// One dense problem: rows are (line, column, view) of a block of positions, the sum runs over its taps and channels.
struct Dense {
  int lines, columns, views;          // rows of the problem
  int source_side, source_step;       // a row reads around (line, column) * source_step
  int target_side, target_step;       // and writes to (line, column) * target_step + (target_y, target_x)
  int target_y, target_x;
  int taps;
  int8_t shift_y[kTaps], shift_x[kTaps], tap[kTaps];  // where a tap reads; which of the weight's nine it is

  MVL_BODY int rows() const { return lines * columns * views; }
};

struct RowPlace {
  int line, column, view;
};

MVL_BODY RowPlace place_of(const Dense& dense, int row) {
  const int position = row / dense.views, line = position / dense.columns;
  return {line, position - line * dense.columns, row - position * dense.views};
}

MVL_BODY bool tap_inside(const Dense& dense, const RowPlace& place, int t) {
  const int y = place.line * dense.source_step + dense.shift_y[t];
  const int x = place.column * dense.source_step + dense.shift_x[t];
  return y >= 0 && y < dense.source_side && x >= 0 && x < dense.source_side;
}

// Row of the source (position * views + view) under shift 0, and what a tap adds to it.
MVL_BODY int source_row(const Dense& dense, const RowPlace& place) {
  const int y = place.line * dense.source_step, x = place.column * dense.source_step;
  return (y * dense.source_side + x) * dense.views + place.view;
}

MVL_BODY int tap_rows(const Dense& dense, int t) {
  return (dense.shift_y[t] * dense.source_side + dense.shift_x[t]) * dense.views;
}

MVL_BODY int target_row(const Dense& dense, const RowPlace& place) {
  const int y = place.line * dense.target_step + dense.target_y;
  const int x = place.column * dense.target_step + dense.target_x;
  return (y * dense.target_side + x) * dense.views + place.view;
}

// Output positions of the forward pass, which read tokens; also what wgrad sums over.
inline Dense forward_problem(const ConvShape& shape) {
  const int side = shape.out_grid();
  Dense dense{side, side, shape.views, shape.grid, 2, side, 1, 0, 0, kTaps, {}, {}, {}};
  for (int t = 0; t < kTaps; ++t) {
    dense.shift_y[t] = static_cast<int8_t>(t / 3 - 1);
    dense.shift_x[t] = static_cast<int8_t>(t % 3 - 1);
    dense.tap[t] = static_cast<int8_t>(t);
  }
  return dense;
}

// Tokens of lines 2a + y and columns 2b + x, which read output gradients: an even line is reached by the middle tap
// of output line a alone, an odd one by the last tap of line a and the first of line a + 1.
inline Dense dgrad_problem(const ConvShape& shape, int y, int x) {
  const int side = shape.out_grid();
  Dense dense{
      (shape.grid + 1 - y) / 2, (shape.grid + 1 - x) / 2, shape.views, side, 1, shape.grid, 2, y, x, 0, {}, {}, {}};
  for (int sy = 0; sy <= y; ++sy) {
    for (int sx = 0; sx <= x; ++sx) {
      const int dy = y ? 2 - 2 * sy : 1, dx = x ? 2 - 2 * sx : 1;
      dense.shift_y[dense.taps] = static_cast<int8_t>(sy);
      dense.shift_x[dense.taps] = static_cast<int8_t>(sx);
      dense.tap[dense.taps++] = static_cast<int8_t>(dy * 3 + dx);
    }
  }
  return dense;
}

// --- tiles

constexpr int kProblems = 4;

struct Tiles {
  Dense problem[kProblems];
  int first[kProblems + 1];  // tile where each problem begins; unused problems are empty
  int column_tiles;          // tiles of the columns
  int steps_per_tap;         // summed channels / 64
};

struct Tile {
  int problem, row, column;  // in tiles
};

inline Tiles tiles_of(const Dense* problems, int count, int columns, int summed) {
  Tiles tiles{};
  tiles.column_tiles = columns / kTileColumns;
  tiles.steps_per_tap = summed / kStep;
  for (int p = 0; p < kProblems; ++p) {
    if (p < count) tiles.problem[p] = problems[p];
    const int rows = p < count ? static_cast<int>(ceil_div(problems[p].rows(), kTileRows)) : 0;
    tiles.first[p + 1] = tiles.first[p] + rows * tiles.column_tiles;
  }
  return tiles;
}

inline Tiles forward_tiles(const ConvShape& shape) {
  const Dense dense = forward_problem(shape);
  return tiles_of(&dense, 1, shape.out_channels, shape.in_channels);
}

// The longest sums first, so that the short ones fill the end.
inline Tiles dgrad_tiles(const ConvShape& shape) {
  const Dense dense[] = {
      dgrad_problem(shape, 1, 1), dgrad_problem(shape, 0, 1), dgrad_problem(shape, 1, 0), dgrad_problem(shape, 0, 0)};
  return tiles_of(dense, kProblems, shape.in_channels, shape.out_channels);
}

// kGroup row tiles side by side, then the next column tile.
MVL_BODY Tile tile_at(const Tiles& tiles, int index) {
  int p = 0;
  while (p + 1 < kProblems && index >= tiles.first[p + 1]) ++p;
  const int local = index - tiles.first[p];
  const int row_tiles = (tiles.first[p + 1] - tiles.first[p]) / tiles.column_tiles;
  const int group = local / (kGroup * tiles.column_tiles);
  const int height = static_cast<int>(smaller(kGroup, row_tiles - group * kGroup));
  const int within = local - group * kGroup * tiles.column_tiles;
  return {p, group * kGroup + within % height, within / height};
}

// --- copies into shared memory

constexpr int kRowCopies = kTileRows / (kCopyThreads / 8);  // lines that a thread copies of a row image
constexpr int kStepCopies = kStep / (kCopyThreads / 8);      // and of an image with one line per summed element

// One 16-byte copy: byte offset in the stage, element offset in the source; zeros where not inside.
struct Copy {
  int to;
  int64_t from;
  bool inside;
};

// Eight threads bring a line, so a thread keeps its chunk, and line % 8, whatever i is.
MVL_BODY int copied_line(int thread, int i) { return (thread >> 3) + i * (kCopyThreads / 8); }

MVL_BODY int copied_chunk(int thread) { return thread & 7; }

// A row of the left operand of forward and dgrad, as long as its tile lasts.
struct GatheredRow {
  int source;      // row of the source under shift 0
  uint32_t taps;   // bits of the taps inside of the grid; none for rows beyond the problem
};

MVL_BODY GatheredRow gathered_row(const Dense& dense, int row) {
  GatheredRow gathered{0, 0};
  if (row < dense.rows()) {
    const RowPlace place = place_of(dense, row);
    gathered.source = source_row(dense, place);
    for (int t = 0; t < dense.taps; ++t) gathered.taps |= static_cast<uint32_t>(tap_inside(dense, place, t)) << t;
  }
  return gathered;
}

// The i-th copy of a thread for 64 channels from `channel` under tap t; rows_away: tap_rows(dense, t).
MVL_BODY Copy row_copy(
    const GatheredRow& gathered, int thread, int i, int t, int rows_away, int channel, int channels) {
  const bool inside = (gathered.taps >> t) & 1;
  const int64_t row = inside ? gathered.source + rows_away : 0;
  return {swizzled(copied_line(thread, i), copied_chunk(thread)), row * channels + channel + copied_chunk(thread) * 8,
          inside};
}

// Element offset of the image of (column tile, tap of the weight, step) in the packed weight.
MVL_BODY int64_t packed_image(const Tiles& tiles, int column_tile, int tap, int step) {
  const int64_t image = (static_cast<int64_t>(column_tile) * kTaps + tap) * tiles.steps_per_tap + step;
  return image * (kColumnsBytes / 2);
}

// Where 8 input channels from `c` of output channel `o` stand in the packed weight of the forward pass (columns o,
// lines along the sum over c) and of dgrad (columns c, lines across: one o each). Element offsets.
MVL_BODY int64_t packed_forward(const Tiles& tiles, int o, int c, int tap) {
  const int inside = swizzled(o % kTileColumns, (c % kStep) / 8);
  return packed_image(tiles, o / kTileColumns, tap, c / kStep) + inside / 2;
}

MVL_BODY int64_t packed_dgrad(const Tiles& tiles, int o, int c, int tap) {
  const int column = c % kTileColumns;
  const int inside = column / kStep * kSegment + swizzled(o % kStep, (column % kStep) / 8);
  return packed_image(tiles, c / kTileColumns, tap, o / kStep) + inside / 2;
}

// --- products

// Strides in bytes of a wgmma operand: between groups of 64 rows or columns (across only) and between groups of 8
// lines; and what 16 further summed elements add to the start.
struct Operand {
  int segment_stride, group_stride, advance;
};

constexpr Operand kAlong{0, 8 * kLine, 32};
constexpr Operand kAcross{kSegment, 8 * kLine, 16 * kLine};

// Matrix descriptor: start, leading and stride offsets in units of 16 bytes, layout 1 = 128-byte swizzle. Across the
// sum the leading offset separates segments; along it, it is not used with a swizzle and set to 1.
MVL_BODY uint64_t descriptor(uint32_t start, const Operand& operand) {
  const uint64_t leading = operand.segment_stride ? operand.segment_stride >> 4 : 1;
  return static_cast<uint64_t>((start & 0x3ffffu) >> 4) | (leading << 16) |
         (static_cast<uint64_t>(operand.group_stride >> 4) << 32) | (static_cast<uint64_t>(1) << 62);
}

// Row and column in the 64 x 256 accumulator of a warpgroup of value i of a thread.
MVL_BODY int sum_row(int thread, int i) { return (thread >> 5) * 16 + ((thread & 31) >> 2) + ((i & 2) ? 8 : 0); }

MVL_BODY int sum_column(int thread, int i) { return (i >> 2) * 8 + (thread & 3) * 2 + (i & 1); }

constexpr int kSums = 128;  // accumulators of a thread

struct alignas(4) Pair {
  bf16 value[2];
};

MVL_BODY void store_pair(bf16* to, float a, float b) {
  *reinterpret_cast<Pair*>(to) = Pair{{from_float<bf16>(a), from_float<bf16>(b)}};
}

// A thread's share of a tile of forward or dgrad. first: row of the problem of the warpgroup's row 0; column: of the
// tile. Four lanes write 16 bytes of a row: 64 KB once per tile, against 48 KB copied in each of 48 to 432 steps.
MVL_BODY void store_rows(
    const Dense& dense, int first, int column, int thread, const float (&sums)[kSums], const bf16* bias, bf16* target,
    int channels) {
  MVL_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = first + sum_row(thread, 2 * half);
    if (row < dense.rows()) {
      const int64_t at = static_cast<int64_t>(target_row(dense, place_of(dense, row))) * channels + column;
      MVL_UNROLL
      for (int i = 2 * half; i < kSums; i += 4) {
        const int j = sum_column(thread, i);
        const float a = bias ? to_float(bias[column + j]) : 0.0f, b = bias ? to_float(bias[column + j + 1]) : 0.0f;
        store_pair(target + at + j, sums[i] + a, sums[i + 1] + b);
      }
    }
  }
}

// --- wgrad: rows o, columns c of one tap, summed over output rows

struct WgradTile {
  int tap, row, column;  // row and column in tiles
};

MVL_BODY int wgrad_tiles(const ConvShape& shape) {
  return kTaps * (shape.out_channels / kTileRows) * (shape.in_channels / kTileColumns);
}

// Taps side by side: they read the same tokens, a line apart.
MVL_BODY WgradTile wgrad_tile_at(const ConvShape& shape, int index) {
  const int rest = index / kTaps, rows = shape.out_channels / kTileRows;
  return {index - rest * kTaps, rest % rows, rest / rows};
}

// The tokens' row that an output row reads under a tap; none beyond the rows or outside of the grid.
struct SummedRow {
  bool lives, inside;
  int source;
};

MVL_BODY SummedRow summed_row(const Dense& dense, int row, int t) {
  SummedRow summed{row < dense.rows(), false, 0};
  if (summed.lives) {
    const RowPlace place = place_of(dense, row);
    summed.inside = tap_inside(dense, place, t);
    if (summed.inside) summed.source = source_row(dense, place) + tap_rows(dense, t);
  }
  return summed;
}

// The copy of segment `segment` of 64 channels of a summed row into its line of an image.
MVL_BODY Copy line_copy(int thread, int i, int segment, bool inside, int row, int channel, int channels) {
  const int chunk = copied_chunk(thread);
  const int64_t from = static_cast<int64_t>(inside ? row : 0) * channels + channel + segment * kStep + chunk * 8;
  return {segment * kSegment + swizzled(copied_line(thread, i), chunk), from, inside};
}

// A thread's share of a tile, into by_tap[tap][o][c]. first: o of the warpgroup's row 0.
MVL_BODY void store_by_tap(
    const ConvShape& shape, int tap, int first, int column, int thread, const float (&sums)[kSums], bf16* by_tap) {
  MVL_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int o = first + sum_row(thread, 2 * half);
    bf16* line = by_tap + (static_cast<int64_t>(tap) * shape.out_channels + o) * shape.in_channels + column;
    MVL_UNROLL
    for (int i = 2 * half; i < kSums; i += 4) store_pair(line + sum_column(thread, i), sums[i], sums[i + 1]);
  }
}

}  // namespace mvl
