// What the kernels' text needs of CUDA, so that g++ compiles it and a CPU runs it: see block.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

// __CUDA_ARCH__ is defined behind this file, for the kernel's text alone: CUDA's own headers would
// take g++ for nvcc.
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so all its threads share what is static. Nothing else of a kernel lies
// in .bss, so that block.cpp can fill it before each block.
#define __shared__ static
#define alignas(bytes) __attribute__((aligned(bytes)))  // g++ has no alignas behind static

struct Index {
  unsigned int x;
};
extern Index threadIdx;
extern Index blockIdx;

// Each waits for the other threads, and remembers where in the text it does.
void wait_for_block(const char* file, int line);
void wait_for_warp(unsigned int mask, const char* file, int line);
unsigned long long shuffled(unsigned int mask, unsigned long long value, unsigned int from_lane,
                            const char* file, int line);

#define HOST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HOST_HERE) { wait_for_block(file, line); }

inline void __syncwarp(HOST_HERE) { wait_for_warp(0xffffffffu, file, line); }

template <typename T>
T __shfl_sync(unsigned int mask, T value, int lane, HOST_HERE) {
  static_assert(sizeof(T) <= sizeof(unsigned long long), "a shuffle moves 8 bytes at most");
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(value));
  bits = shuffled(mask, bits, lane % 32u, file, line);
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int distance, HOST_HERE) {
  return __shfl_sync(mask, value, threadIdx.x ^ distance, file, line);
}

inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return static_cast<unsigned long long>(a) * b >> 32;
}

// By other names, since C23 has these too.
inline float inverse_square_root(float value) { return 1 / std::sqrt(value); }
inline double inverse_square_root(double value) { return 1 / std::sqrt(value); }
#define rsqrtf inverse_square_root
#define rsqrt inverse_square_root

// Calls a kernel as a launch does: each thread has its own copy of the parameters.
template <typename Params>
void call(void (*kernel)(Params), const void* params) {
  kernel(*static_cast<const Params*>(params));
}
