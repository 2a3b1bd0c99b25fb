// Exhaustive checks of the implicit GEMMs' index maps at the released sizes; exit code 1 and a line where one fails.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "mvl/pack.cuh"

using namespace mvl;

namespace {

void expect(bool holds, const char* what, int64_t a = 0, int64_t b = 0) {
  if (holds) return;
  std::printf("%s: %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

// Every value of `seen` must be `times`.
void expect_each(const std::vector<uint8_t>& seen, int times, const char* what) {
  for (size_t i = 0; i < seen.size(); ++i) expect(seen[i] == times, what, static_cast<int64_t>(i), seen[i]);
}

// Every tile once; every target row once over all problems; taps and sources by the definition of the convolution.
void check_tiles(const ConvShape& shape, bool forward) {
  const Tiles tiles = forward ? forward_tiles(shape) : dgrad_tiles(shape);
  const int out = shape.out_grid(), side = forward ? out : shape.grid, source_side = forward ? shape.grid : out;
  std::vector<uint8_t> written(static_cast<size_t>(side) * side * shape.views);
  std::vector<std::vector<uint8_t>> visited;
  for (int p = 0; p < kProblems; ++p) visited.emplace_back(tiles.first[p + 1] - tiles.first[p]);
  for (int index = 0; index < tiles.first[kProblems]; ++index) {
    const Tile tile = tile_at(tiles, index);
    expect(tile.column >= 0 && tile.column < tiles.column_tiles, "column tile", index, tile.column);
    const size_t at = static_cast<size_t>(tile.row) * tiles.column_tiles + tile.column;
    expect(at < visited[tile.problem].size(), "row tile", index, tile.row);
    ++visited[tile.problem][at];
  }
  for (const auto& of_problem : visited) expect_each(of_problem, 1, "tile visited");
  int taps = 0;
  for (int p = 0; p < (forward ? 1 : kProblems); ++p) {
    const Dense& dense = tiles.problem[p];
    taps += dense.taps;
    const int row_tiles = (tiles.first[p + 1] - tiles.first[p]) / tiles.column_tiles;
    expect(row_tiles * kTileRows >= dense.rows() && (row_tiles - 1) * kTileRows < dense.rows(), "rows covered", p);
    for (int row = 0; row < row_tiles * kTileRows; ++row) {
      const GatheredRow gathered = gathered_row(dense, row);
      if (row >= dense.rows()) {
        expect(gathered.taps == 0, "a row beyond the problem reads", row);
        continue;
      }
      const int target = target_row(dense, place_of(dense, row));
      ++written[target];
      const int view = target % shape.views, y = target / shape.views / side, x = target / shape.views % side;
      for (int t = 0; t < dense.taps; ++t) {
        // forward: token (2y + dy - 1, 2x + dx - 1); dgrad: the output that reads token (y, x) by this tap
        const int dy = dense.tap[t] / 3 - 1, dx = dense.tap[t] % 3 - 1;
        const int twice_y = forward ? 2 * y + dy : y - dy, twice_x = forward ? 2 * x + dx : x - dx;
        if (!forward) expect(twice_y % 2 == 0 && twice_x % 2 == 0, "a tap of the wrong parity", target, t);
        const int sy = forward ? twice_y : twice_y / 2, sx = forward ? twice_x : twice_x / 2;
        const bool inside = twice_y >= 0 && twice_x >= 0 && sy < source_side && sx < source_side;
        expect(((gathered.taps >> t) & 1) == inside, "tap inside", target, t);
        if (inside) {
          const int expected = (sy * source_side + sx) * shape.views + view;
          expect(gathered.source + tap_rows(dense, t) == expected, "source row", target, t);
        }
      }
    }
  }
  expect(taps == kTaps, "each tap belongs to one problem", taps);
  expect_each(written, 1, "target row written");
}

// The copies of a step bring every 16 bytes of an image once, and eight neighbouring threads hit different banks.
void check_copies() {
  std::vector<uint8_t> rows(kRowsBytes / 16), lines(kColumnsBytes / 16);
  GatheredRow gathered{5, 1};
  for (int thread = 0; thread < kCopyThreads; ++thread) {
    for (int i = 0; i < kRowCopies; ++i) {
      const Copy copy = row_copy(gathered, thread, i, 0, 2, 64, 1536);
      expect(copy.from == 7 * 1536 + 64 + 8 * copied_chunk(thread), "source of a copy", thread, i);
      ++rows[copy.to / 16];
    }
    for (int i = 0; i < kStepCopies; ++i) {
      for (int s = 0; s < kTileColumns / kStep; ++s) ++lines[line_copy(thread, i, s, true, 3, 0, 256).to / 16];
    }
  }
  expect_each(rows, 1, "bytes of the row image");
  expect_each(lines, 1, "bytes of the column image");
  for (int line = 0; line < 64; line += 8) {  // what wgmma reads together: a chunk of 8 lines
    for (int chunk = 0; chunk < 8; ++chunk) {
      int banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1 << (swizzled(line + i, chunk) / 16 % 8);
      expect(banks == 0xff, "bank conflict", line, chunk);
    }
  }
}

void check_sums() {
  std::vector<uint8_t> seen(64 * kTileColumns);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kSums; ++i) ++seen[sum_row(thread, i) * kTileColumns + sum_column(thread, i)];
  }
  expect_each(seen, 1, "accumulator");
}

void check_descriptors() {
  for (const Operand& operand : {kAlong, kAcross}) {
    for (int stage = 0; stage < kStages; ++stage) {
      const uint32_t start = 1024 + stage * kStageBytes + kRowsBytes;
      const uint64_t made = descriptor(start, operand) + 3 * (operand.advance >> 4);
      expect((made & 0x3fff) << 4 == start + 3 * operand.advance, "start address", stage);
      expect(((made >> 32) & 0x3fff) << 4 == static_cast<uint64_t>(operand.group_stride), "group stride", stage);
    }
  }
  expect(kStages * kStageBytes + 2048 <= 227 * 1024, "shared memory of a block");
}

// Both packed forms hold every element once.
void check_packing(const ConvShape& shape) {
  const Tiles forward = forward_tiles(shape), dgrad = dgrad_tiles(shape);
  const size_t chunks = static_cast<size_t>(weight_records(shape)) * kTaps;
  std::vector<uint8_t> first(chunks), second(chunks);
  for (int64_t index = 0; index < weight_records(shape); ++index) {
    const RecordPlace place = record_place(shape, index);
    for (int t = 0; t < kTaps; ++t) {
      ++first[packed_forward(forward, place.o, place.c, t) / 8];
      ++second[packed_dgrad(dgrad, place.o, place.c, t) / 8];
    }
  }
  expect_each(first, 1, "packed for the forward pass");
  expect_each(second, 1, "packed for dgrad");
}

void check_wgrad(const ConvShape& shape) {
  const int rows = shape.out_channels / kTileRows, columns = shape.in_channels / kTileColumns;
  std::vector<uint8_t> seen(static_cast<size_t>(wgrad_tiles(shape)));
  for (int index = 0; index < wgrad_tiles(shape); ++index) {
    const WgradTile tile = wgrad_tile_at(shape, index);
    ++seen[(static_cast<size_t>(tile.tap) * rows + tile.row) * columns + tile.column];
  }
  expect_each(seen, 1, "tile of wgrad");
  const Dense dense = forward_problem(shape);
  for (int row = 0; row < dense.rows() + kStep; ++row) {
    const GatheredRow gathered = gathered_row(dense, row);
    for (int t = 0; t < kTaps; ++t) {
      const SummedRow summed = summed_row(dense, row, t);
      expect(summed.lives == (row < dense.rows()), "summed row lives", row, t);
      expect(summed.inside == ((gathered.taps >> t) & 1), "summed row inside", row, t);
      if (summed.inside) expect(summed.source == gathered.source + tap_rows(dense, t), "summed source", row, t);
    }
  }
}

}  // namespace

int main() {
  for (const int grid : {1, 2, 3, 9, 13, 18, 26, 36, 52}) {
    for (const int views : {1, 3, 64}) {
      for (const bool forward : {true, false}) check_tiles({grid, views, 1536, 3072}, forward);
      check_wgrad({grid, views, 256, 512});
    }
  }
  check_copies();
  check_sums();
  check_descriptors();
  check_packing({36, 1, 1536, 3072});
  check_packing({18, 1, 256, 768});
  return 0;
}
