// Elements of any DType to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/dtype.h"

namespace ternary::sm90 {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <class Element>
__device__ Element from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two neighbours as they lie in memory.
template <class Element>
__device__ uint32_t pack(Element first, Element second) {
  const uint16_t low = *reinterpret_cast<const uint16_t*>(&first);
  return low | uint32_t{*reinterpret_cast<const uint16_t*>(&second)} << 16;
}

// The same two as floats, in two instructions.
template <class Element>
__device__ float2 widen_pair(uint32_t pair);
template <>
__device__ inline float2 widen_pair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
template <>
__device__ inline float2 widen_pair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Two floats, rounded.
template <class Element>
__device__ uint32_t pack_floats(float first, float second) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Element i of `from`.
__device__ inline float load_float(const void* from, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(from)[i];
  if (type == DType::f16) return to_float(static_cast<const __half*>(from)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(from)[i]);
}

// Element i of `to`.
__device__ inline void store_float(float v, void* to, DType type, int64_t i) {
  if (type == DType::f32)
    static_cast<float*>(to)[i] = v;
  else if (type == DType::f16)
    static_cast<__half*>(to)[i] = from_float<__half>(v);
  else
    static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(v);
}

__host__ __device__ inline int size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Calls f with a value of the C++ type that `type` names.
template <class Function>
int with_type(DType type, Function f) {
  if (type == DType::f32) return f(float{});
  if (type == DType::f16) return f(__half{});
  return f(__nv_bfloat16{});
}

template <class Function>
__device__ void with_type_on_device(DType type, Function f) {
  if (type == DType::f32)
    f(float{});
  else if (type == DType::f16)
    f(__half{});
  else
    f(__nv_bfloat16{});
}

// N elements that are read or written at once: in accesses of up to 16 bytes where kAligned, else one by one.
template <class Element, int N, bool kAligned>
struct alignas(!kAligned                  ? sizeof(Element)
               : sizeof(Element) * N < 16 ? sizeof(Element) * N
                                          : 16) Run {
  Element at[N];
};

// N elements as the words that hold them, which take fewer registers than halves one by one.
template <class Element, int N>
struct alignas(sizeof(Element) * N < 16 ? sizeof(Element) * N : 16) Words {
  static constexpr int kPerWord = 4 / sizeof(Element);
  uint32_t at[N / kPerWord];
};

template <class Element, int N>
__device__ void to_floats(float (&to)[N], const Words<Element, N>& from) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    if constexpr (sizeof(Element) == 4) {
      to[i] = __uint_as_float(from.at[i]);
      to[i + 1] = __uint_as_float(from.at[i + 1]);
    } else {
      const float2 pair = widen_pair<Element>(from.at[i / 2]);
      to[i] = pair.x;
      to[i + 1] = pair.y;
    }
  }
}

template <class Element, int N>
__device__ Words<Element, N> to_words(const float (&from)[N]) {
  Words<Element, N> to;
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    if constexpr (sizeof(Element) == 4) {
      to.at[i] = __float_as_uint(from[i]);
      to.at[i + 1] = __float_as_uint(from[i + 1]);
    } else {
      to.at[i / 2] = pack_floats<Element>(from[i], from[i + 1]);
    }
  }
  return to;
}

template <class Element, int N>
__device__ Words<Element, N> load_words(const Element* from) {
  return *reinterpret_cast<const Words<Element, N>*>(from);
}

template <class Element, int N>
__device__ void store_words(Element* to, const Words<Element, N>& words) {
  *reinterpret_cast<Words<Element, N>*>(to) = words;
}

inline bool is_aligned(const void* pointer, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace ternary::sm90
