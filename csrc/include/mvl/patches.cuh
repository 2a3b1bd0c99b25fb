// Bytes of views to the rows of the patch embedding: (x / 255 - mean) / deviation, in this order, in fp32.
//
// pixels: uint8 [n, 3, height, width]. out: [(height / p) * (width / p), n, 3 p p], channels then rows then columns of
// a patch. mean, deviation: fp32 [3].
#pragma once

#include "mvl/core.cuh"

namespace mvl {

constexpr int kColours = 3;
constexpr int kPatchGroup = 4;  // neighbouring elements of a row of `out` that one lane writes

template <class T>
struct alignas(kPatchGroup * sizeof(T)) PatchGroup {
  T value[kPatchGroup];
};

template <class T>
struct Patchify {
  const uint8_t* pixels;
  const float* mean;
  const float* deviation;
  T* out;
  int n, height, width, patch;

  MVL_BODY int row_groups() const { return kColours * patch * patch / kPatchGroup; }

  // Group `at` of the row of patch (y, x) of one view.
  MVL_BODY void operator()(int view, int y, int x, int at) const {
    PatchGroup<T> group;
    const int area = patch * patch;
    MVL_UNROLL
    for (int i = 0; i < kPatchGroup; ++i) {
      const int element = at * kPatchGroup + i;
      const int colour = element / area, inside = element - colour * area;
      const int row = inside / patch, column = inside - row * patch;
      const int64_t from = ((static_cast<int64_t>(view) * kColours + colour) * height + y * patch + row) * width;
      const float value = static_cast<float>(pixels[from + x * patch + column]);
      group.value[i] = from_float<T>((value / 255.0f - mean[colour]) / deviation[colour]);
    }
    const int64_t to = (static_cast<int64_t>(y) * (width / patch) + x) * n + view;
    *reinterpret_cast<PatchGroup<T>*>(out + (to * row_groups() + at) * kPatchGroup) = group;
  }
};

template <class T>
void host_patchify(const Patchify<T>& body) {
  for (int view = 0; view < body.n; ++view) {
    for (int y = 0; y < body.height / body.patch; ++y) {
      for (int x = 0; x < body.width / body.patch; ++x) {
        for (int at = 0; at < body.row_groups(); ++at) body(view, y, x, at);
      }
    }
  }
}

}  // namespace mvl
