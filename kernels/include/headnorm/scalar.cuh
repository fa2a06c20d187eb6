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
