// What every kernel shares: number formats, 128-bit packs, sizes of a launch.
//
// The same bodies are compiled by nvcc for the device and by g++ for the CPU, so nothing here includes CUDA headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MVL_BODY __host__ __device__ __forceinline__
#else
#define MVL_BODY inline
#endif
#ifdef __CUDA_ARCH__
#define MVL_UNROLL _Pragma("unroll")
#else
#define MVL_UNROLL
#endif

// A kernel declared with this instead of __global__ is a matrix product: `make check` wants HGMMA in its file.
#define MVL_GEMM_KERNEL __global__

namespace mvl {

// Codes of number formats in the extern "C" functions.
enum Format : int { kFloat32 = 0, kBFloat16 = 1 };

struct bf16 {
  uint16_t bits;
};

MVL_BODY float to_float(float x) { return x; }

MVL_BODY float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

template <class T>
MVL_BODY T from_float(float x);

template <>
MVL_BODY float from_float<float>(float x) {
  return x;
}

// To nearest, ties to even; NaN stays NaN.
template <>
MVL_BODY bf16 from_float<bf16>(float x) {
  bf16 result;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    result.bits = 0x7fc0;
  } else {
    result.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
#endif
  return result;
}

// Elements of one 128-bit access.
template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

// What one 128-bit access moves; addresses are multiples of 16 bytes (the bindings check it).
template <class T>
struct alignas(16) Pack {
  T value[kWidth<T>];
};

// Of a tensor that the kernel does not write: the read-only path lets loads of later rows pass earlier stores.
template <class T>
MVL_BODY Pack<T> load(const T* at) {
  Pack<T> pack;
#ifdef __CUDA_ARCH__
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(at));
  memcpy(&pack, &words, sizeof(pack));
#else
  std::memcpy(&pack, at, sizeof(pack));
#endif
  return pack;
}

template <class T>
MVL_BODY void store(T* at, const Pack<T>& pack) {
#ifdef __CUDA_ARCH__
  uint4 words;
  memcpy(&words, &pack, sizeof(words));
  // written out, because the compiler stores a copied struct in four pieces
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w));
#else
  std::memcpy(at, &pack, sizeof(pack));
#endif
}

// kWidth values as fp32.
template <class T>
struct Floats {
  float value[kWidth<T>];
};

template <class T>
MVL_BODY Floats<T> unpack(const Pack<T>& pack) {
  Floats<T> out;
  MVL_UNROLL
  for (int i = 0; i < kWidth<T>; ++i) out.value[i] = to_float(pack.value[i]);
  return out;
}

template <class T>
MVL_BODY Pack<T> pack(const Floats<T>& floats) {
  Pack<T> out;
  MVL_UNROLL
  for (int i = 0; i < kWidth<T>; ++i) out.value[i] = from_float<T>(floats.value[i]);
  return out;
}

template <class T>
MVL_BODY Floats<T> load_floats(const T* at) {
  return unpack(load(at));
}

MVL_BODY int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

MVL_BODY int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace mvl
