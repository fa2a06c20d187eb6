// Sums over the lanes of a row, in one fixed order.
#ifndef HEADNORM_REDUCE_CUH
#define HEADNORM_REDUCE_CUH

namespace headnorm {

inline constexpr int kWarp = 32;
inline constexpr unsigned int kFullMask = 0xffffffffu;

// Every lane ends with the same bits: a butterfly adds the same pairs in every lane, and addition
// commutes. All 32 lanes of the warp must arrive.
template <int kLanes, typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc value) {
  static_assert(kLanes >= 1 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0,
                "lanes must be a power of two");
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullMask, value, distance);
  }
  return value;
}

// Waits until the lanes of a row see each other's writes to shared memory.
template <int kLanes>
__device__ __forceinline__ void row_barrier() {
  if constexpr (kLanes <= kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Sums over the kLanes neighbouring threads that share a row: within a warp, or over the whole
// block. `partial` holds one value a warp: each reduction of a row brings one of its own, so that
// no second barrier is needed, and whoever does several rows waits before the next.
template <int kLanes, typename Acc>
__device__ __forceinline__ Acc row_sum(Acc value, Acc (&partial)[kWarp]) {
  if constexpr (kLanes <= kWarp) {
    return warp_sum<kLanes>(value);
  } else {
    static_assert(kLanes % kWarp == 0 && kLanes <= kWarp * kWarp, "a row is at most one block");
    constexpr int kWarps = kLanes / kWarp;
    value = warp_sum<kWarp>(value);
    if (threadIdx.x % kWarp == 0) {
      partial[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    return warp_sum<kWarps>(partial[threadIdx.x % kWarps]);
  }
}

}  // namespace headnorm

#endif  // HEADNORM_REDUCE_CUH
