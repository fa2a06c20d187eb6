// Who owns which elements of a row, and how they come from and to memory.
#ifndef HEADNORM_GEOMETRY_CUH
#define HEADNORM_GEOMETRY_CUH

#include "headnorm/reduce.cuh"
#include "headnorm/vec.cuh"

namespace headnorm {

// Accesses up to this many bytes are staged. Out of place, 64 MB of 16-bit elements one off a
// 16-byte boundary, H100, share of a copy staged / not: head_dim 64 0.80 / 0.39, 128 0.84 / 0.41,
// 256 0.93 / 0.44, 1024 0.83 / 0.42. Accesses of 4 bytes need no stage: 0.93 to 0.99.
inline constexpr int kStagedBytes = 2;
// Rows of fewer lanes are too short for it: a team would hold many rows' addresses and spill.
inline constexpr int kStagedLanes = 4;

// Which lane owns which elements: vector j of tile t of lane l starts at element
// ((t * kVectors + j) * kLanes + l) * kVec. A row that fits in registers is one tile:
//
//   kVec 2, kLanes 4, kVectors 2, head_dim 14
//   element   0 1   2 3   4 5   6 7   8 9   10 11  12 13
//   lane        0     1     2     3     0     1      2
//   vector      0     0     0     0     1     1      1
template <int kHeadDimT, int kVecT, int kAccessT, int kParameterAccessT, int kLanesT, int kVectorsT,
          int kThreadsT>
struct Geometry {
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kVec = kVecT;
  static constexpr int kAccess = kAccessT;
  static constexpr int kParameterAccess = kParameterAccessT;
  static constexpr int kLanes = kLanesT;
  static constexpr int kVectors = kVectorsT;
  static constexpr int kThreads = kThreadsT;
  static constexpr int kTile = kVec * kLanes * kVectors;
  static constexpr int kTiles = (kHeadDim - 1) / kTile + 1;
  static_assert(kHeadDim >= 1, "a row has elements");
  static_assert(kHeadDim % kVec == 0, "a vector lies wholly inside or outside the row");
  static_assert(kHeadDim <= 0x7fffffff - kTile, "32-bit offsets inside a row");
  static constexpr bool kEveryLaneFull = kHeadDim % kTile == 0;

  static __device__ __forceinline__ int first_element(int tile, int vector, int lane) {
    return ((tile * kVectors + vector) * kLanes + lane) * kVec;
  }
  static __device__ __forceinline__ bool inside(int element) {
    return kEveryLaneFull || element < kHeadDim;
  }
};

// Moves a row's vectors, one of each lane at a time, between global memory and registers.
//
// A lane that took its own vector from misaligned memory element by element would touch each sector
// as often as it has elements, and so would its neighbours. Instead neighbouring lanes of a warp
// move neighbouring elements, of one row after the other, and vectors are put together in shared
// memory. Who owns an element stays the same.
template <typename T, typename G>
struct Mover {
  static constexpr bool kStaged =
      G::kAccess < G::kVec && G::kAccess * sizeof(T) <= kStagedBytes && G::kLanes >= kStagedLanes;
  static constexpr int kRowVectors = G::kLanes * G::kVec;              // elements
  static constexpr int kTeam = G::kLanes < kWarp ? kWarp : G::kLanes;  // threads that move together
  static constexpr int kTeamRows = kTeam / G::kLanes;
  static constexpr int kRowPieces = (kRowVectors / G::kAccess + kTeam - 1) / kTeam;
  static constexpr int kPieces = kTeamRows * kRowPieces;
  using Row = Vec<T, G::kVec>;
  using Piece = Vec<T, G::kAccess>;

  T* stage;  // of the block: one vector a thread
  int lane;
  bool row_exists;

  __device__ __forceinline__ T* own() const { return stage + threadIdx.x * G::kVec; }

  __device__ __forceinline__ void load(Row& vec, const T* row, int tile, int j) const {
    const int first = G::first_element(tile, j, lane);
    if constexpr (kStaged) {
      const TeamRows<const T> rows(row, row_exists);
      Piece pieces[kPieces];
      each_piece(rows, tile, j,
                 [&](int k, const T* at, int) { pieces[k].template load<G::kAccess>(at); });
      each_piece(rows, tile, j, [&](int k, const T*, int slot) {
        pieces[k].template store<G::kAccess>(stage + slot);
      });
      row_barrier<G::kLanes>();
      if (row_exists && G::inside(first)) {
        vec.template load<G::kVec>(own());
      }
      row_barrier<G::kLanes>();
    } else if (row_exists && G::inside(first)) {
      vec.template load<G::kAccess>(row + first);
    }
  }

  __device__ __forceinline__ void store(const Row& vec, T* row, int tile, int j) const {
    const int first = G::first_element(tile, j, lane);
    if constexpr (kStaged) {
      if (row_exists && G::inside(first)) {
        vec.template store<G::kVec>(own());
      }
      row_barrier<G::kLanes>();
      const TeamRows<T> rows(row, row_exists);
      Piece pieces[kPieces];
      each_piece(rows, tile, j,
                 [&](int k, T*, int slot) { pieces[k].template load<G::kAccess>(stage + slot); });
      each_piece(rows, tile, j,
                 [&](int k, T* at, int) { pieces[k].template store<G::kAccess>(at); });
      row_barrier<G::kLanes>();
    } else if (row_exists && G::inside(first)) {
      vec.template store<G::kAccess>(row + first);
    }
  }

  // The rows of a team of threads; null for one that does not exist.
  template <typename Element>
  struct TeamRows {
    Element* row[kTeamRows];

    __device__ __forceinline__ TeamRows(Element* own_row, bool row_exists) {
      const unsigned long long address =
          row_exists ? reinterpret_cast<unsigned long long>(own_row) : 0;
#pragma unroll
      for (int r = 0; r < kTeamRows; ++r) {
        row[r] = reinterpret_cast<Element*>(
            kTeamRows > 1 ? __shfl_sync(kFullMask, address, r * G::kLanes) : address);
      }
    }
  };

  // Calls move(number, address, slot in the stage) for each piece that this thread moves.
  template <typename Element, typename Move>
  __device__ __forceinline__ void each_piece(const TeamRows<Element>& rows, int tile, int j,
                                             Move move) const {
    const int member = threadIdx.x % kTeam;
    const int stage_of_team = (threadIdx.x - member) * G::kVec;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      Element* const row = rows.row[k / kRowPieces];
      const int slot = (k % kRowPieces * kTeam + member) * G::kAccess;
      const int element = G::first_element(tile, j, 0) + slot;
      if (row != nullptr && slot < kRowVectors && G::inside(element)) {
        move(k, row + element, stage_of_team + k / kRowPieces * kRowVectors + slot);
      }
    }
  }
};

}  // namespace headnorm

#endif  // HEADNORM_GEOMETRY_CUH
