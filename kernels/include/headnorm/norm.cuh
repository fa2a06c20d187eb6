// One row: read once, normalized, written once.
#ifndef HEADNORM_NORM_CUH
#define HEADNORM_NORM_CUH

#include "headnorm/reduce.cuh"
#include "headnorm/rows.cuh"
#include "headnorm/scalar.cuh"
#include "headnorm/vec.cuh"

namespace headnorm {

enum class Kind { rms, layer };

// With n the normalized value, w the weight plus its offset, b the bias, R rounding to x's type:
//   once           R(n w + b)
//   before_weight  R(R(n) w + b)
enum class Rounding { once, before_weight };

// Which lane owns which elements: vector j of tile t of lane l starts at element
// ((t * kVectors + j) * kLanes + l) * kVec. A row that fits in registers is one tile:
//
//   kVec 2, kLanes 4, kVectors 2, head_dim 14
//   element   0 1   2 3   4 5   6 7   8 9   10 11  12 13
//   lane        0     1     2     3     0     1      2
//   vector      0     0     0     0     1     1      1
template <int kHeadDimT, int kVecT, int kAccessT, int kLanesT, int kVectorsT>
struct Geometry {
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kVec = kVecT;
  static constexpr int kAccess = kAccessT;
  static constexpr int kLanes = kLanesT;
  static constexpr int kVectors = kVectorsT;
  static constexpr int kTile = kVec * kLanes * kVectors;
  static constexpr int kTiles = (kHeadDim - 1) / kTile + 1;
  static_assert(kHeadDim >= 1, "a row has elements");
  static_assert(kHeadDim % kVec == 0, "a vector lies wholly inside or outside the row");
  static_assert(kHeadDim <= 0x7fffffff - kTile, "32-bit offsets inside a row");
  static constexpr bool kEveryLaneFull = kHeadDim % kTile == 0;

  static __device__ __forceinline__ int first_element(int tile, int vector, int lane) {
    return ((tile * kVectors + vector) * kLanes + lane) * kVec;
  }
};

// A power of two near 1 / head_dim. Scaling by it is exact and keeps a sum of head_dim squares of
// values up to 1e18 inside float32's range.
constexpr double sum_scale(int head_dim) {
  double scale = 1.0;
  for (int n = head_dim; n > 1; n = (n + 1) / 2) {
    scale *= 0.5;
  }
  return scale;
}

template <typename G, typename T, typename Acc>
__device__ __forceinline__ void load_tile(Acc (&value)[G::kVectors][G::kVec], const T* row,
                                          int tile, int lane, bool row_exists) {
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
    const int first = G::first_element(tile, j, lane);
    Vec<T, G::kVec> vec = {};
    if (row_exists && (G::kEveryLaneFull || first < G::kHeadDim)) {
      vec.template load<G::kAccess>(row + first);
    }
#pragma unroll
    for (int i = 0; i < G::kVec; ++i) {
      value[j][i] = widen<Acc>(vec.element[i]);
    }
  }
}

template <typename G, typename W>
__device__ __forceinline__ void load_parameters(Vec<W, G::kVec>& vec, const W* row, int first,
                                                bool row_exists) {
  if constexpr (kPresent<W>) {
    if (row_exists && (G::kEveryLaneFull || first < G::kHeadDim)) {
      vec.template load<G::kAccess>(row + first);
    }
  }
}

template <Kind kKind, Rounding kRounding, typename T, typename W, typename B, typename G,
          int kMaxAxes>
__device__ __forceinline__ void norm_row(const Params<typename Accumulate<T>::type, kMaxAxes>& p,
                                         const RowPlace& place, int lane, bool row_exists) {
  using Acc = typename Accumulate<T>::type;
  constexpr Acc kScale = static_cast<Acc>(sum_scale(G::kHeadDim));
  constexpr Acc kInverseCount = static_cast<Acc>(1.0 / G::kHeadDim);
  constexpr Acc kInverseScaledCount = static_cast<Acc>(1.0 / G::kHeadDim / sum_scale(G::kHeadDim));
  __shared__ Acc partial[2][kWarp];

  // x and out may be one array, so nothing here may promise the compiler that they are not.
  const T* x = reinterpret_cast<const T*>(p.x + place.x);
  T* out = reinterpret_cast<T*>(p.out + place.out);
  const W* weight = reinterpret_cast<const W*>(p.weight + place.weight);
  const B* bias = reinterpret_cast<const B*>(p.bias + place.bias);

  // A longer row than registers hold is read again for each pass, tile by tile.
  constexpr bool kOneTile = G::kTiles == 1;
  Acc value[G::kVectors][G::kVec];
  Vec<W, G::kVec> weights[G::kVectors];
  Vec<B, G::kVec> biases[G::kVectors];
  // Weights are fetched together with x where registers allow: then nothing waits for them later.
  constexpr int kParameterBytes = (kPresent<W> ? sizeof(W) : 0) + (kPresent<B> ? sizeof(B) : 0);
  constexpr bool kEarly = kOneTile && G::kVectors * G::kVec * kParameterBytes <= 64;
  if constexpr (kOneTile) {
    load_tile<G>(value, x, 0, lane, row_exists);
  }
  if constexpr (kEarly) {
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      load_parameters<G>(weights[j], weight, G::first_element(0, j, lane), row_exists);
      load_parameters<G>(biases[j], bias, G::first_element(0, j, lane), row_exists);
    }
  }

  Acc mean = 0;
  if constexpr (kKind == Kind::layer) {
    Acc sum = 0;
#pragma unroll 1
    for (int tile = 0; tile < G::kTiles; ++tile) {
      if constexpr (!kOneTile) {
        load_tile<G>(value, x, tile, lane, row_exists);
      }
#pragma unroll
      for (int j = 0; j < G::kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < G::kVec; ++i) {
          sum += value[j][i];
        }
      }
    }
    mean = row_sum<G::kLanes>(sum, partial[0]) * kInverseCount;
  }

  Acc squares = 0;
#pragma unroll 1
  for (int tile = 0; tile < G::kTiles; ++tile) {
    if constexpr (!kOneTile) {
      load_tile<G>(value, x, tile, lane, row_exists);
    }
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      // Slots past the row hold zeros; less the mean they would not be.
      const bool inside =
          kKind == Kind::rms || G::kEveryLaneFull || G::first_element(tile, j, lane) < G::kHeadDim;
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        const Acc centred = inside ? value[j][i] - mean : Acc(0);
        squares = multiply_add(centred * kScale, centred, squares);
      }
    }
  }
  const Acc mean_square = row_sum<G::kLanes>(squares, partial[1]) * kInverseScaledCount;
  const Acc inverse = inverse_root(mean_square + p.eps);

#pragma unroll 1
  for (int tile = 0; tile < G::kTiles; ++tile) {
    if constexpr (!kOneTile) {
      load_tile<G>(value, x, tile, lane, row_exists);
    }
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      const int first = G::first_element(tile, j, lane);
      if constexpr (!kEarly) {
        load_parameters<G>(weights[j], weight, first, row_exists);
        load_parameters<G>(biases[j], bias, first, row_exists);
      }
      Vec<T, G::kVec> vec;
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        Acc y = (value[j][i] - mean) * inverse;
        if constexpr (kRounding == Rounding::before_weight) {
          y = widen<Acc>(Round<T>::from(y));
        }
        if constexpr (kPresent<W>) {
          y *= widen<Acc>(weights[j].element[i]) + p.weight_offset;
        }
        if constexpr (kPresent<B>) {
          y += widen<Acc>(biases[j].element[i]);
        }
        vec.element[i] = Round<T>::from(y);
      }
      if (row_exists && (G::kEveryLaneFull || first < G::kHeadDim)) {
        vec.template store<G::kAccess>(out + first);
      }
    }
  }
}

}  // namespace headnorm

#endif  // HEADNORM_NORM_CUH
