// One row: read once, normalized, written once.
#ifndef HEADNORM_NORM_CUH
#define HEADNORM_NORM_CUH

#include "headnorm/geometry.cuh"
#include "headnorm/reduce.cuh"
#include "headnorm/rows.cuh"
#include "headnorm/scalar.cuh"
#include "headnorm/vec.cuh"

namespace headnorm {

enum class Kind { rms, layer };

// With n the normalized value, w the weight plus its offset, b the bias, R rounding to x's type:
//   once           R(n w + b)
//   before_weight  R(R(n) w + b)
//   every_op       R(R(R(n) w) + b)
//   rstd           R(x R(r)), r the inverse root mean square: without weight and bias
enum class Rounding { once, before_weight, every_op, rstd };

// A power of two near 1 / head_dim, by which a lane's sum of squares is scaled. That is exact and
// keeps the sum of head_dim squares inside float32's range, values being up to 1e18, and centred
// ones up to 2e18. So many of them stay in it as they are, a lane's always.
template <Kind kKind>
constexpr double sum_scale(int head_dim) {
  double scale = 1.0;
  if (head_dim <= (kKind == Kind::rms ? 256 : 64)) {
    return scale;
  }
  for (int n = head_dim; n > 1; n = (n + 1) / 2) {
    scale *= 0.5;
  }
  return scale;
}

// Sums over the lanes of a row: of values, squares and differences from the mean.
inline constexpr int kSums = 3;

template <typename G, typename T, typename Acc>
__device__ __forceinline__ void load_tile(Acc (&value)[G::kVectors][G::kVec], const T* row,
                                          int tile, const Mover<T, G>& mover) {
  Vec<T, G::kVec> vecs[G::kVectors];
  mover.load(vecs, row, tile);
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
    widen_to(value[j], vecs[j].element);
  }
}

template <typename G, typename W>
__device__ __forceinline__ void load_parameters(Vec<W, G::kVec>& vec, const W* row, int first,
                                                bool row_exists) {
  if constexpr (kPresent<W>) {
    if (row_exists && G::inside(first)) {
      vec.template load<G::kParameterAccess>(row + first);
    }
  }
}

// A lane of a folded row does the work of kFold lanes, and adds in the same order: a sum for each,
// which `folded` puts together as the first step over the lanes would.
template <int kFold, typename Acc>
__device__ __forceinline__ Acc folded(const Acc (&sum)[kFold]) {
  static_assert(kFold == 1 || kFold == 2, "one step over the lanes is done within them");
  if constexpr (kFold == 2) {
    return sum[0] + sum[1];
  }
  return sum[0];
}

// Adds a tile's values to `sum`, in the order of the vectors.
template <typename G, int kFold, typename Acc>
__device__ __forceinline__ void add_values(Acc (&sum)[kFold],
                                           const Acc (&value)[G::kVectors][G::kVec]) {
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
#pragma unroll
    for (int i = 0; i < G::kVec; ++i) {
      sum[j % kFold] += value[j][i];
    }
  }
}

// Whether the mean is corrected by the mean of the differences from it. The sum of equal values is
// rounded where it has more bits than Acc, the mean then is some units in the last place off, and
// the result is not 0: 1234.567 in float32, head_dim 100, -0.077.
template <Kind kKind, typename T, typename G>
inline constexpr bool kCorrectsMean =
    kKind == Kind::layer && (sizeof(T) >= 4 || G::kHeadDim > 8192);

// A tile's squares about `mean`, scaled, and the differences from it where they are `kSummed`.
template <Kind kKind, bool kSummed, typename G, int kFold, typename Acc>
__device__ __forceinline__ void sum_squares(Acc (&squares)[kFold], Acc (&differences)[kFold],
                                            const Acc (&value)[G::kVectors][G::kVec], Acc mean,
                                            int tile, int lane) {
#pragma unroll
  for (int f = 0; f < kFold; ++f) {
    squares[f] = 0;
    differences[f] = 0;
  }
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
    // Slots past the row hold zeros; less the mean they would not be.
    const bool inside = kKind == Kind::rms || G::inside(G::first_element(tile, j, lane));
#pragma unroll
    for (int i = 0; i < G::kVec; ++i) {
      const Acc centred = inside ? value[j][i] - mean : Acc(0);
      squares[j % kFold] = multiply_add(centred, centred, squares[j % kFold]);
      if constexpr (kSummed) {
        differences[j % kFold] += centred;
      }
    }
  }
#pragma unroll
  for (int f = 0; f < kFold; ++f) {
    squares[f] *= static_cast<Acc>(sum_scale<kKind>(G::kHeadDim));
  }
}

// A quotient: the sum of equal 16-bit values is exact, and their mean is to be exact too, where a
// product with the rounded inverse may be one unit in the last place off.
template <typename G, typename Acc>
__device__ __forceinline__ Acc mean_of(Acc sum, Acc (&partial)[kWarp]) {
  constexpr Acc kInverseCount = static_cast<Acc>(1.0 / G::kHeadDim);
  sum = row_sum<G::kLanes>(sum, partial);
  const Acc mean = sum * kInverseCount;
  if constexpr ((G::kHeadDim & (G::kHeadDim - 1)) == 0) {
    return mean;
  }
  const Acc rest = multiply_add(-mean, static_cast<Acc>(G::kHeadDim), sum);
  return multiply_add(rest, kInverseCount, mean);
}

// The inverse root of the mean of the scaled squares, rounded to T where that is asked for.
template <Kind kKind, Rounding kRounding, typename T, typename G, typename Acc>
__device__ __forceinline__ Acc inverse_of(Acc squares, Acc eps, Acc (&partial)[kWarp]) {
  constexpr Acc kInverseScaledCount =
      static_cast<Acc>(1.0 / G::kHeadDim / sum_scale<kKind>(G::kHeadDim));
  const Acc sum = row_sum<G::kLanes>(squares, partial);
  const Acc inverse = inverse_root(multiply_add(sum, kInverseScaledCount, eps));
  return kRounding == Rounding::rstd ? widen<Acc>(Round<T>::from(inverse)) : inverse;
}

// One vector of results. `scale` is the weight with its offset.
template <Rounding kRounding, typename T, bool kScaled, bool kShifted, int kVec, typename Acc>
__device__ __forceinline__ Vec<T, kVec> finished(const Acc (&value)[kVec], Acc mean, Acc inverse,
                                                 const Acc (&scale)[kVec],
                                                 const Acc (&bias)[kVec]) {
  constexpr bool kBeforeWeight =
      kRounding == Rounding::before_weight || kRounding == Rounding::every_op;
  Acc y[kVec];
  Vec<T, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    y[i] = (value[i] - mean) * inverse;
  }
  if constexpr (kBeforeWeight) {
    round_to(result.element, y);
    if constexpr (!kScaled && !kShifted) {
      return result;  // the compiler would round once more
    }
    widen_to(y, result.element);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if constexpr (kScaled) {
      y[i] *= scale[i];
    }
  }
  if constexpr (kShifted && kRounding == Rounding::every_op) {
    round_to(result.element, y);
    widen_to(y, result.element);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if constexpr (kShifted) {
      y[i] += bias[i];
    }
  }
  round_to(result.element, y);
  return result;
}

// Whether a rounded value meets a weight of its own type and nothing else: then one instruction
// multiplies two and rounds. It keeps subnormals of bfloat16, which float would flush, so every
// kernel takes it or none.
template <Rounding kRounding, typename T, typename W, bool kOffset, typename B, int kVec>
inline constexpr bool kWeighsTwo =
    kMultipliesTwo && Two<T>::kThere && kVec % 2 == 0 && kSame<W, T> && !kPresent<B> && !kOffset &&
    (kRounding == Rounding::before_weight || kRounding == Rounding::every_op);

// One vector of results where `kWeighsTwo`.
template <Rounding kRounding, typename T, int kVec, typename Acc>
__device__ __forceinline__ Vec<T, kVec> weighed(const Acc (&value)[kVec], Acc mean, Acc inverse,
                                                const Vec<T, kVec>& weight) {
  using Pair = typename Two<T>::type;
  Vec<T, kVec> result = finished<kRounding, T, false, false>(value, mean, inverse, value, value);
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    // The _rn form is never fused with another operation.
    const Pair two = __hmul2_rn(Pair(result.element[i], result.element[i + 1]),
                                Pair(weight.element[i], weight.element[i + 1]));
    result.element[i] = two.x;
    result.element[i + 1] = two.y;
  }
  return result;
}

template <Kind kKind, Rounding kRounding, typename T, typename W, bool kOffset, typename B,
          typename G, typename Index, int kAxes>
__device__ __forceinline__ void norm_row(
    const Params<typename Accumulate<T>::type, Index, kAxes>& p, const RowPlace& place, int lane,
    bool row_exists) {
  static_assert(kRounding != Rounding::rstd || (kKind == Kind::rms && !kPresent<W> && !kPresent<B>),
                "rstd is of RMS without weight and bias");
  using Acc = typename Accumulate<T>::type;
  __shared__ Acc partial[kSums][kWarp];
  __shared__ alignas(16) unsigned char stage[Mover<T, G>::kStage * sizeof(T)];
  const Mover<T, G> mover{reinterpret_cast<T*>(stage), lane, row_exists};

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
  // Full vectors of a row within a warp cover whole sectors, however far apart they are moved.
  constexpr bool kWholeSectors = G::kVec * sizeof(T) == 16 && G::kLanes <= kWarp;
  // Weights are fetched together with x where registers allow: then nothing waits for them later.
  // Layer holds them over two sums, and is better off with more rows at a time: bfloat16, 64 MB,
  // H100, share of a copy with late / early weights: head_dim 192 0.98 / 0.97, 512 0.98 / 0.97.
  // Other rows are not: head_dim 72 0.94 / 1.00, 100 0.81 / 0.97, 4096 0.96 / 0.98.
  constexpr int kParameterBytes = (kPresent<W> ? sizeof(W) : 0) + (kPresent<B> ? sizeof(B) : 0);
  constexpr int kEarlyBytes = kKind == Kind::layer && kWholeSectors ? 16 : 64;
  constexpr bool kEarly = kOneTile && G::kVectors * G::kVec * kParameterBytes <= kEarlyBytes;
  // Stores of small pieces must follow one another, so that sectors meet in the cache: with
  // arithmetic between them head_dim 33 of float16 ran at 0.53 of copy speed instead of 0.91.
  // Larger ones are better off at once: layer of 160 bfloat16 0.99, held back 0.96 (H100, 64 MB).
  constexpr bool kStoreAtOnce = G::kVec * sizeof(T) >= 8 && !Mover<T, G>::kStaged;
  if constexpr (kOneTile) {
    load_tile<G>(value, x, 0, mover);
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
    Acc sum[1] = {};
#pragma unroll 1
    for (int tile = 0; tile < G::kTiles; ++tile) {
      if constexpr (!kOneTile) {
        load_tile<G>(value, x, tile, mover);
      }
      add_values<G>(sum, value);
    }
    mean = mean_of<G>(sum[0], partial[0]);
  }

  constexpr bool kCorrected = kCorrectsMean<kKind, T, G>;
  Acc squares = 0;
  Acc differences = 0;
#pragma unroll 1
  for (int tile = 0; tile < G::kTiles; ++tile) {
    if constexpr (!kOneTile) {
      load_tile<G>(value, x, tile, mover);
    }
    Acc of_tile[2][1];
    sum_squares<kKind, kCorrected, G>(of_tile[0], of_tile[1], value, mean, tile, lane);
    squares = kOneTile ? of_tile[0][0] : squares + of_tile[0][0];
    differences = kOneTile ? of_tile[1][0] : differences + of_tile[1][0];
  }
  if constexpr (kCorrected) {
    mean += mean_of<G>(differences, partial[2]);
  }
  const Acc inverse = inverse_of<kKind, kRounding, T, G>(squares, p.eps, partial[1]);

#pragma unroll 1
  for (int tile = 0; tile < G::kTiles; ++tile) {
    if constexpr (!kOneTile) {
      load_tile<G>(value, x, tile, mover);
    }
    Vec<T, G::kVec> results[G::kVectors];
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      const int first = G::first_element(tile, j, lane);
      if constexpr (!kEarly) {
        load_parameters<G>(weights[j], weight, first, row_exists);
        load_parameters<G>(biases[j], bias, first, row_exists);
      }
      if constexpr (kWeighsTwo<kRounding, T, W, kOffset, B, G::kVec>) {
        results[j] = weighed<kRounding>(value[j], mean, inverse, weights[j]);
      } else {
        Acc scale[G::kVec];
        Acc shift[G::kVec];
        if constexpr (kPresent<W>) {
          widen_to(scale, weights[j].element);
#pragma unroll
          for (int i = 0; kOffset && i < G::kVec; ++i) {
            scale[i] += p.weight_offset;
          }
        }
        if constexpr (kPresent<B>) {
          widen_to(shift, biases[j].element);
        }
        results[j] =
            finished<kRounding, T, kPresent<W>, kPresent<B>>(value[j], mean, inverse, scale, shift);
      }
      if constexpr (kStoreAtOnce) {
        mover.store(results[j], out, tile, j);
      }
    }
    if constexpr (!kStoreAtOnce) {
      mover.store(results, out, tile);
    }
  }
}

}  // namespace headnorm

#endif  // HEADNORM_NORM_CUH
