// The rotary embedding of a row that lies in the registers of its lanes.
#ifndef HEADNORM_ROPE_CUH
#define HEADNORM_ROPE_CUH

#include "headnorm/geometry.cuh"
#include "headnorm/reduce.cuh"
#include "headnorm/scalar.cuh"
#include "headnorm/vec.cuh"

namespace headnorm {

// Which two elements rotate about each other, R being rotary_dim:
//   half          e and e + R / 2, the first one minus the other's sine (NeoX)
//   half_flipped  the same, plus
//   interleaved   2 i and 2 i + 1 (GPT-J)
enum class RopeStyle { none, half, half_flipped, interleaved };

// Which row of positions a frequency takes: M-RoPE has one for time, height and width. Sizes of the
// sections follow; a single one where positions have no rows.
enum class Sections { none, chunks, interleaved };

template <RopeStyle kStyleT, int kRotaryDimT, bool kEveryOpT, bool kWholeRowsT, Sections kSections,
          int... kSizes>
struct Rope {
  static constexpr RopeStyle kStyle = kStyleT;
  static constexpr int kRotaryDim = kRotaryDimT;
  static constexpr int kPairs = kRotaryDim / 2;
  // Every product and the sum are rounded to x's type, not the sum alone.
  static constexpr bool kEveryOp = kEveryOpT;
  // Rows of cosines and sines have an entry for each element, not for each pair.
  static constexpr bool kWholeRows = kWholeRowsT;
  static constexpr int kPositionRows = sizeof...(kSizes);
  static constexpr bool kInterleaved = kStyle == RopeStyle::interleaved;
  static_assert(kStyle == RopeStyle::none || (kRotaryDim >= 2 && kRotaryDim % 2 == 0),
                "elements rotate in pairs");

  // Pairs lie within a lane's vector, or in vectors of one lane so far apart.
  template <typename G>
  static constexpr bool kWithinVector = kInterleaved && G::kVec % 2 == 0;
  template <typename G>
  static constexpr int kVectorsApart =
      !kInterleaved && kPairs % (G::kLanes * G::kVec) == 0 ? kPairs / (G::kLanes * G::kVec) : 0;
  template <typename G>
  static constexpr bool kWithinLane = kWithinVector<G> || kVectorsApart<G> != 0;

  template <typename G>
  static __device__ __forceinline__ bool rotates(int element) {
    return (kRotaryDim == G::kHeadDim && G::kEveryLaneFull) || element < kRotaryDim;
  }
  static __device__ __forceinline__ int partner(int element) {
    if constexpr (kInterleaved) {
      return element ^ 1;
    }
    return element < kPairs ? element + kPairs : element - kPairs;
  }
  // Whether the partner's product with the sine is subtracted.
  static constexpr bool kSubtractsFirst = kStyle != RopeStyle::half_flipped;
  static __device__ __forceinline__ bool subtracts(int element) {
    return (kInterleaved ? element % 2 == 0 : element < kPairs) == kSubtractsFirst;
  }
  static __device__ __forceinline__ int pair(int element) {
    if constexpr (kInterleaved) {
      return element / 2;
    }
    return element < kPairs ? element : element - kPairs;
  }
  static __device__ __forceinline__ int position_row(int frequency) {
    int row = 0;
    if constexpr (kSections == Sections::chunks) {
      int end = 0;
      ((row += frequency >= (end += kSizes)), ...);
    }
    if constexpr (kSections == Sections::interleaved) {
      row = frequency % kPositionRows;
      int at = 0;
      int size = 0;
      ((size = at++ == row ? kSizes : size), ...);
      row = frequency < size * kPositionRows ? row : 0;
    }
    return row;
  }
};

// Cosines and sines of the elements that a lane owns, of one token: read once for all its heads.
// Sines have their partner's sign. They are in x's type where every operation is rounded, as in
// the models that do so, else in the type of the arithmetic.
template <typename T, typename Table, typename R, typename G>
struct Rotation {
  using Acc = typename Accumulate<T>::type;
  using Factor = typename Select<R::kEveryOp, T, Acc>::type;
  using Entries = Vec<Table, G::kVec>;
  Vec<Factor, G::kVec> cosine[G::kVectors];
  Vec<Factor, G::kVec> sine[G::kVectors];

  // How the entries of a vector lie, for rotary_dim 8 and kVec 2:
  //
  //   element                  0 1   2 3   4 5   6 7
  //   whole rows               0 1   2 3   4 5   6 7    together
  //   one a pair, half         0 1   2 3   0 1   2 3    together
  //   one a pair, interleaved  0 0   1 1   2 2   3 3    in halves: each entry is for two elements
  //
  // They lie apart where a vector has pairs of several rows of positions, or does not rotate as a
  // whole, or kVec does not divide the number of pairs.
  //
  // `row` holds the bytes from the first entries to the token's, for each row of positions. A
  // vector of entries lies on a boundary of kAccess of them.
  template <int kAccess>
  __device__ __forceinline__ void load(const char* cosines, const char* sines,
                                       const long long (&row)[R::kPositionRows], int lane,
                                       bool exists) {
    constexpr bool kOneRow = R::kPositionRows == 1 && R::kRotaryDim % G::kVec == 0;
    constexpr bool kTogether =
        kOneRow && (R::kWholeRows || (!R::kInterleaved && R::kPairs % G::kVec == 0));
    constexpr bool kHalves = kOneRow && R::kInterleaved && G::kVec % 2 == 0;
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      const int first = G::first_element(0, j, lane);
      Entries entries[2] = {};
      if (exists && R::template rotates<G>(first)) {
        const Table* const cosines_at = reinterpret_cast<const Table*>(cosines + row[0]);
        const Table* const sines_at = reinterpret_cast<const Table*>(sines + row[0]);
        if constexpr (kTogether) {
          const int at = R::kWholeRows ? first : R::pair(first);
          entries[0].template load<kAccess>(cosines_at + at);
          entries[1].template load<kAccess>(sines_at + at);
        } else if constexpr (kHalves) {
          load_halves<kAccess>(entries, cosines_at, sines_at, first);
        } else {
          load_apart(entries, cosines, sines, row, first);
        }
      }
      keep(entries, j, first);
    }
  }

  template <int kAccess>
  static __device__ __forceinline__ void load_halves(Entries (&entries)[2], const Table* cosines,
                                                     const Table* sines, int first) {
    constexpr int kHalf = G::kVec / 2;
    constexpr int kHalfAccess = kAccess < kHalf ? kAccess : kHalf;
    Vec<Table, kHalf> pairs[2];
    pairs[0].template load<kHalfAccess>(cosines + first / 2);
    pairs[1].template load<kHalfAccess>(sines + first / 2);
#pragma unroll
    for (int i = 0; i < G::kVec; ++i) {
      entries[0].element[i] = pairs[0].element[i / 2];
      entries[1].element[i] = pairs[1].element[i / 2];
    }
  }

  static __device__ __forceinline__ void load_apart(Entries (&entries)[2], const char* cosines,
                                                    const char* sines,
                                                    const long long (&row)[R::kPositionRows],
                                                    int first) {
#pragma unroll
    for (int i = 0; i < G::kVec; ++i) {
      const int element = first + i;
      if (R::template rotates<G>(element)) {
        const int at = R::kWholeRows ? element : R::pair(element);
        const int section = R::position_row(R::pair(element));
        long long bytes = row[0];
#pragma unroll
        for (int r = 1; r < R::kPositionRows; ++r) {
          bytes = section == r ? row[r] : bytes;
        }
        entries[0].element[i] = reinterpret_cast<const Table*>(cosines + bytes)[at];
        entries[1].element[i] = reinterpret_cast<const Table*>(sines + bytes)[at];
      }
    }
  }

  // Keeps entries as factors, sines with their partner's sign.
  __device__ __forceinline__ void keep(const Entries (&entries)[2], int j, int first) {
    if constexpr (kSame<Table, Factor>) {
      cosine[j] = entries[0];
      sine[j] = entries[1];
    } else {
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        cosine[j].element[i] = Round<Factor>::from(widen<Acc>(entries[0].element[i]));
        sine[j].element[i] = Round<Factor>::from(widen<Acc>(entries[1].element[i]));
      }
    }
    if constexpr (R::template kVectorsApart<G> != 0) {
      if (R::kSubtractsFirst == (j < R::template kVectorsApart<G>)) {
        negate(sine[j].element);
      }
    } else {
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        const Factor s = sine[j].element[i];
        sine[j].element[i] = R::subtracts(first + i) ? -s : s;
      }
    }
  }
};

// Rotates a row. Partners that another lane owns come by `stage`, a tile of shared memory of the
// row's own; all lanes of the warp, or of the block, must arrive.
template <bool kAllRotated, typename T, typename Table, typename R, typename G>
__device__ __forceinline__ void rotate(Vec<T, G::kVec> (&row)[G::kVectors],
                                       const Rotation<T, Table, R, G>& rotation, T* stage, int lane,
                                       bool rotated) {
  using Acc = typename Accumulate<T>::type;
  Vec<T, G::kVec> partner[G::kVectors] = {};
  if constexpr (R::template kWithinVector<G>) {
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        partner[j].element[i] = row[j].element[i ^ 1];
      }
    }
  } else if constexpr (R::template kVectorsApart<G> != 0) {
    constexpr int kApart = R::template kVectorsApart<G>;
#pragma unroll
    for (int j = 0; j < 2 * kApart && j < G::kVectors; ++j) {
      partner[j] = row[j < kApart ? j + kApart : j - kApart];
    }
  } else {
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      row[j].template store<G::kVec>(stage + G::first_element(0, j, lane));
    }
    row_barrier<G::kLanes>();
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      const int first = G::first_element(0, j, lane);
      if constexpr (!R::kInterleaved && R::kPairs % G::kVec == 0) {
        if (R::template rotates<G>(first)) {
          partner[j].template load<G::kVec>(stage + R::partner(first));
        }
      } else {
#pragma unroll
        for (int i = 0; i < G::kVec; ++i) {
          if (R::template rotates<G>(first + i)) {
            partner[j].element[i] = stage[R::partner(first + i)];
          }
        }
      }
    }
    row_barrier<G::kLanes>();
  }
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
    Vec<T, G::kVec> result;
    if constexpr (R::kEveryOp) {
      rounded_sum(result.element, row[j].element, rotation.cosine[j].element, partner[j].element,
                  rotation.sine[j].element);
    } else {
      Acc y[G::kVec];
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        y[i] = widen<Acc>(row[j].element[i]) * rotation.cosine[j].element[i] +
               widen<Acc>(partner[j].element[i]) * rotation.sine[j].element[i];
      }
      round_to(result.element, y);
    }
#pragma unroll
    for (int i = 0; i < G::kVec; ++i) {
      if ((kAllRotated || rotated) && R::template rotates<G>(G::first_element(0, j, lane) + i)) {
        row[j].element[i] = result.element[i];
      }
    }
  }
}

}  // namespace headnorm

#endif  // HEADNORM_ROPE_CUH
