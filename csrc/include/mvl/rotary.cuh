// RoPE-2D: rotates adjacent pairs of q and k by the angles of their patch, and takes q, k and v apart.
//
// qkv: [s, b, heads, 3 d], a head's q, k, v one after the other, as the product of the attention's weights has them.
// table: fp32 [s, d / 2, 2], cosine and sine of each pair. q, k, v: [b, s, heads, d] in memory (handed out as
// [s, b, heads, d]), so that attention over several views takes them without a copy.
#pragma once

#include "mvl/core.cuh"

namespace mvl {

struct RotarySizes {
  int64_t s, b, heads, d;

  // Offset of (patch, view, head) in q, k or v; thrice that of the head in qkv, up to the order of s and b.
  MVL_BODY int64_t apart(int64_t patch, int64_t view, int64_t head) const {
    return ((view * s + patch) * heads + head) * d;
  }
  MVL_BODY int64_t together(int64_t patch, int64_t view, int64_t head) const {
    return ((patch * b + view) * heads + head) * 3 * d;
  }
};

// direction: 1 rotates, -1 rotates back.
template <class T>
MVL_BODY Pack<T> rotated(const Pack<T>& packed, const float* table, float direction) {
  const Floats<T> x = unpack(packed);
  Floats<T> out;
  MVL_UNROLL
  for (int i = 0; i < kWidth<T>; i += 4) {
    const Floats<float> pair = load_floats(table + i);  // cosine, sine of two pairs
    MVL_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const float c = pair.value[j], s = direction * pair.value[j + 1];
      out.value[i + j] = x.value[i + j] * c - x.value[i + j + 1] * s;
      out.value[i + j + 1] = x.value[i + j + 1] * c + x.value[i + j] * s;
    }
  }
  return pack<T>(out);
}

// One pack of a head of one patch; `at`: first of its channels.
template <class T>
struct RotateApart {
  const T* qkv;
  const float* table;
  T* q;
  T* k;
  T* v;
  RotarySizes sizes;

  MVL_BODY void operator()(int64_t patch, int64_t view, int64_t head, int64_t at) const {
    const T* from = qkv + sizes.together(patch, view, head) + at;
    const int64_t to = sizes.apart(patch, view, head) + at;
    const float* angles = table + patch * sizes.d + at;
    const Pack<T> query = load(from), key = load(from + sizes.d), value = load(from + 2 * sizes.d);
    store(q + to, rotated<T>(query, angles, 1.0f));
    store(k + to, rotated<T>(key, angles, 1.0f));
    store(v + to, value);
  }
};

// Its transpose: gradients of q, k, v, as laid out above, to that of qkv.
template <class T>
struct RotateTogether {
  const T* q;
  const T* k;
  const T* v;
  const float* table;
  T* qkv;
  RotarySizes sizes;

  MVL_BODY void operator()(int64_t patch, int64_t view, int64_t head, int64_t at) const {
    T* to = qkv + sizes.together(patch, view, head) + at;
    const int64_t from = sizes.apart(patch, view, head) + at;
    const float* angles = table + patch * sizes.d + at;
    const Pack<T> query = load(q + from), key = load(k + from), value = load(v + from);
    store(to, rotated<T>(query, angles, -1.0f));
    store(to + sizes.d, rotated<T>(key, angles, -1.0f));
    store(to + 2 * sizes.d, value);
  }
};

template <class T, class Body>
void host_rotate(const Body& body) {
  const RotarySizes& n = body.sizes;
  for (int64_t patch = 0; patch < n.s; ++patch) {
    for (int64_t view = 0; view < n.b; ++view) {
      for (int64_t head = 0; head < n.heads; ++head) {
        for (int64_t at = 0; at < n.d; at += kWidth<T>) body(patch, view, head, at);
      }
    }
  }
}

}  // namespace mvl
