// A few neighbouring elements, moved by instructions as wide as the memory's alignment allows.
#ifndef HEADNORM_VEC_CUH
#define HEADNORM_VEC_CUH

namespace headnorm {

template <int kBytes>
struct Chunk;
template <>
struct Chunk<2> {
  using type = unsigned short;
};
template <>
struct Chunk<4> {
  using type = unsigned int;
};
template <>
struct Chunk<8> {
  using type = uint2;
};
template <>
struct Chunk<16> {
  using type = uint4;
};

// kSize elements. kAccess of them are known to lie on a boundary of their own size, or of 16 bytes
// if they are larger; that alone chooses the instructions, never which elements a lane owns.
template <typename T, int kSize>
struct Vec {
  T element[kSize];

  template <int kAccess>
  struct Access {
    static_assert(kAccess >= 1 && kSize % kAccess == 0, "a vector is a whole number of accesses");
    static constexpr int kBytes = kAccess * sizeof(T) < 16 ? kAccess * sizeof(T) : 16;
    static constexpr int kChunks = kSize * sizeof(T) / kBytes;
    using ChunkType = typename Chunk<kBytes>::type;
  };

  template <int kAccess>
  __device__ __forceinline__ void load(const T* from) {
    using A = Access<kAccess>;
    typename A::ChunkType chunks[A::kChunks];
#pragma unroll
    for (int i = 0; i < A::kChunks; ++i) {
      chunks[i] = reinterpret_cast<const typename A::ChunkType*>(from)[i];
    }
    memcpy(element, chunks, sizeof(element));
  }

  // Zeros where it is not `there`.
  template <int kAccess>
  __device__ __forceinline__ void load_if(bool there, const T* from) {
    using A = Access<kAccess>;
    typename A::ChunkType chunks[A::kChunks] = {};
    if (there) {
#pragma unroll
      for (int i = 0; i < A::kChunks; ++i) {
        chunks[i] = reinterpret_cast<const typename A::ChunkType*>(from)[i];
      }
    }
    memcpy(element, chunks, sizeof(element));
  }

  template <int kAccess>
  __device__ __forceinline__ void store(T* to) const {
    using A = Access<kAccess>;
    typename A::ChunkType chunks[A::kChunks];
    memcpy(chunks, element, sizeof(element));
#pragma unroll
    for (int i = 0; i < A::kChunks; ++i) {
      reinterpret_cast<typename A::ChunkType*>(to)[i] = chunks[i];
    }
  }
};

}  // namespace headnorm

#endif  // HEADNORM_VEC_CUH
