// Element types and the roundings between them.
#ifndef HEADNORM_SCALAR_CUH
#define HEADNORM_SCALAR_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace headnorm {

// Stands where a norm has no weight or no bias.
struct None {};

template <typename T>
inline constexpr bool kPresent = true;
template <>
inline constexpr bool kPresent<None> = false;

template <bool kFirst, typename A, typename B>
struct Select {
  using type = A;
};
template <typename A, typename B>
struct Select<false, A, B> {
  using type = B;
};

template <typename A, typename B>
inline constexpr bool kSame = false;
template <typename A>
inline constexpr bool kSame<A, A> = true;

// All arithmetic is done in float, in double for double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <typename Acc>
__device__ __forceinline__ Acc widen(__half value) {
  return static_cast<Acc>(__half2float(value));
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__nv_bfloat16 value) {
  return static_cast<Acc>(__bfloat162float(value));
}
template <typename Acc>
__device__ __forceinline__ Acc widen(float value) {
  return static_cast<Acc>(value);
}
// A double weight beside a narrower x is rounded to float here.
template <typename Acc>
__device__ __forceinline__ Acc widen(double value) {
  return static_cast<Acc>(value);
}

// Neighbours are taken from 32-bit words: element by element, the compiler would take words that
// may not have been loaded apart and put them together again.
template <typename Acc, typename T, int kCount>
__device__ __forceinline__ void widen_to(Acc (&to)[kCount], const T (&from)[kCount]) {
  if constexpr (kSame<T, __nv_bfloat16> && kCount % 2 == 0) {
    unsigned int words[kCount / 2];
    memcpy(words, from, sizeof(words));
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const unsigned int halves[2] = {words[i / 2] << 16, words[i / 2] & 0xffff0000u};
      float values[2];  // a bfloat16 is the upper half of a float
      memcpy(values, halves, sizeof(values));
      to[i] = values[0];
      to[i + 1] = values[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = widen<Acc>(from[i]);
    }
  }
}

// Round to nearest even, once.
template <typename T>
struct Round;
template <>
struct Round<__half> {
  static __device__ __forceinline__ __half from(float value) { return __float2half_rn(value); }
};
template <>
struct Round<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float value) {
    return __float2bfloat16_rn(value);
  }
};
template <>
struct Round<float> {
  static __device__ __forceinline__ float from(float value) { return value; }
};
template <>
struct Round<double> {
  static __device__ __forceinline__ double from(double value) { return value; }
};

// Two neighbours in one register, where instructions work on both at once.
template <typename T>
struct Two {
  static constexpr bool kThere = false;
};
template <>
struct Two<__half> {
  static constexpr bool kThere = true;
  using type = __half2;
  static __device__ __forceinline__ type from(float a, float b) { return __floats2half2_rn(a, b); }
};
template <>
struct Two<__nv_bfloat16> {
  static constexpr bool kThere = true;
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type from(float a, float b) {
    return __floats2bfloat162_rn(a, b);
  }
};
#if __CUDA_ARCH__ >= 900
inline constexpr bool kMultipliesTwo = true;
#else
inline constexpr bool kMultipliesTwo = false;
#endif

template <typename T, int kCount, typename Acc>
__device__ __forceinline__ void round_to(T (&to)[kCount], const Acc (&from)[kCount]) {
  if constexpr (Two<T>::kThere && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const typename Two<T>::type two = Two<T>::from(from[i], from[i + 1]);
      to[i] = two.x;
      to[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = Round<T>::from(from[i]);
    }
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void negate(T (&values)[kCount]) {
  if constexpr (Two<T>::kThere && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const typename Two<T>::type two = __hneg2(typename Two<T>::type(values[i], values[i + 1]));
      values[i] = two.x;
      values[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = -values[i];
    }
  }
}

// a b + c d, both products and the sum rounded to T. One instruction on two 16-bit numbers rounds
// as arithmetic in float would: there a product is exact, and so is a sum of which more than the
// nearest 16-bit number is ever asked.
template <typename T, int kCount>
__device__ __forceinline__ void rounded_sum(T (&to)[kCount], const T (&a)[kCount],
                                            const T (&b)[kCount], const T (&c)[kCount],
                                            const T (&d)[kCount]) {
  if constexpr (kMultipliesTwo && Two<T>::kThere && kCount % 2 == 0) {
    using Pair = typename Two<T>::type;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      // The _rn forms are never fused into one rounding.
      const Pair first = __hmul2_rn(Pair(a[i], a[i + 1]), Pair(b[i], b[i + 1]));
      const Pair second = __hmul2_rn(Pair(c[i], c[i + 1]), Pair(d[i], d[i + 1]));
      const Pair two = __hadd2_rn(first, second);
      to[i] = two.x;
      to[i + 1] = two.y;
    }
  } else {
    using Acc = typename Accumulate<T>::type;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Acc first = widen<Acc>(Round<T>::from(widen<Acc>(a[i]) * widen<Acc>(b[i])));
      const Acc second = widen<Acc>(Round<T>::from(widen<Acc>(c[i]) * widen<Acc>(d[i])));
      to[i] = Round<T>::from(first + second);
    }
  }
}

// Fused multiply-add where it is meant. The build turns contraction off everywhere else, so that
// two specialisations cannot round one row differently.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

__device__ __forceinline__ float inverse_root(float value) { return rsqrtf(value); }
__device__ __forceinline__ double inverse_root(double value) { return rsqrt(value); }

}  // namespace headnorm

#endif  // HEADNORM_SCALAR_CUH
