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

// Of a block's shared memory that a tile is staged in as a whole: then all of it is on its way at
// once. One off a boundary, rms, 64 MB of bfloat16, H100, share of a copy at once / one vector of
// each lane after the other: head_dim 72 0.77 / 0.60, 160 0.89 / 0.73, 512 0.92 / 0.84, 4096 0.88 /
// 0.63. Longer tiles would keep other blocks out.
inline constexpr int kStageBytesAtMost = 16 * 1024;

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

// Moves a tile of a row between global memory and its lanes' registers.
//
// A lane that took its own vector from misaligned memory element by element would touch each sector
// as often as it has elements, and so would its neighbours. Instead neighbouring lanes of a warp
// move neighbouring elements, of one row after the other, and vectors are put together in shared
// memory. Who owns an element stays the same. If a team had 4 lanes, with kVec 2 and kAccess 1:
//
//   element    0  1  2  3  4  5  6  7
//   moved by   0  1  2  3  0  1  2  3    lanes, between memory and the stage
//   owned by   0  0  1  1  2  2  3  3    lanes, between the stage and registers
template <typename T, typename G>
struct Mover {
  static constexpr bool kStaged =
      G::kAccess < G::kVec && G::kAccess * sizeof(T) <= kStagedBytes && G::kLanes >= kStagedLanes;
  static constexpr bool kWholeTile =
      G::kThreads * G::kVec * G::kVectors * sizeof(T) <= kStageBytesAtMost;
  static constexpr int kTogether = kWholeTile ? G::kVectors : 1;  // vectors of a lane
  static constexpr int kStage = kStaged ? G::kThreads * G::kVec * kTogether : 1;  // elements
  static constexpr int kRowStage = G::kLanes * G::kVec * kTogether;               // elements
  static constexpr int kTeam = G::kLanes < kWarp ? kWarp : G::kLanes;  // threads that move together
  static constexpr int kTeamRows = kTeam / G::kLanes;
  static constexpr int kMoved = kRowStage < G::kHeadDim ? kRowStage : G::kHeadDim;
  static constexpr int kRowPieces = (kMoved / G::kAccess + kTeam - 1) / kTeam;
  static constexpr int kPieces = kTeamRows * kRowPieces;
  using Row = Vec<T, G::kVec>;
  using Piece = Vec<T, G::kAccess>;

  T* stage;  // of the block
  int lane;
  bool row_exists;

  __device__ __forceinline__ T* own(int vector) const {
    const int row = threadIdx.x / G::kLanes * kRowStage;
    return stage + row + (vector % kTogether * G::kLanes + lane) * G::kVec;
  }

  // In one piece: with what fills and empties the stage in functions of their own, NVRTC 13.0 made
  // other code of 12 of 42 staged specialisations.
  __device__ __forceinline__ void load(Row (&tile_of_lane)[G::kVectors], const T* row,
                                       int tile) const {
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      if constexpr (kStaged) {
        if (j % kTogether == 0) {
          const TeamRows<const T> rows(row, row_exists);
          Piece pieces[kPieces];
          each_piece(rows, tile, j,
                     [&](int k, const T* at, int) { pieces[k].template load<G::kAccess>(at); });
          each_piece(rows, tile, j, [&](int k, const T*, int slot) {
            pieces[k].template store<G::kAccess>(stage + slot);
          });
          row_barrier<G::kLanes>();
        }
      }
      const int first = G::first_element(tile, j, lane);
      const bool there = row_exists && G::inside(first);
      if constexpr (kStaged) {
        tile_of_lane[j].template load_if<G::kVec>(there, own(j));
      } else {
        tile_of_lane[j].template load_if<G::kAccess>(there, row + first);
      }
      if constexpr (kStaged) {
        if (j % kTogether == kTogether - 1) {
          row_barrier<G::kLanes>();
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Row (&tile_of_lane)[G::kVectors], T* row,
                                        int tile) const {
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      store(tile_of_lane[j], row, tile, j);
    }
  }

  // One vector of each lane after the other, in their order.
  __device__ __forceinline__ void store(const Row& vector, T* row, int tile, int j) const {
    const int first = G::first_element(tile, j, lane);
    if constexpr (kStaged) {
      if (row_exists && G::inside(first)) {
        vector.template store<G::kVec>(own(j));
      }
      if (j % kTogether == kTogether - 1) {
        row_barrier<G::kLanes>();
        const TeamRows<T> rows(row, row_exists);
        Piece pieces[kPieces];
        const int from = j + 1 - kTogether;
        each_piece(rows, tile, from,
                   [&](int k, T*, int slot) { pieces[k].template load<G::kAccess>(stage + slot); });
        each_piece(rows, tile, from,
                   [&](int k, T* at, int) { pieces[k].template store<G::kAccess>(at); });
        row_barrier<G::kLanes>();
      }
    } else if (row_exists && G::inside(first)) {
      vector.template store<G::kAccess>(row + first);
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

  // Calls move(number, address, slot in the stage) for each piece that this thread moves, `j` being
  // the first vector that is staged. A team goes through its rows as if they were one.
  template <typename Element, typename Move>
  __device__ __forceinline__ void each_piece(const TeamRows<Element>& rows, int tile, int j,
                                             Move move) const {
    const int member = threadIdx.x % kTeam;
    const int stage_of_team = (threadIdx.x - member) / G::kLanes * kRowStage;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      Element* const row = rows.row[k / kRowPieces];
      const int slot = (k % kRowPieces * kTeam + member) * G::kAccess;
      const int element = G::first_element(tile, j, 0) + slot;
      if (row != nullptr && slot < kRowStage && G::inside(element)) {
        move(k, row + element, stage_of_team + k / kRowPieces * kRowStage + slot);
      }
    }
  }
};

}  // namespace headnorm

#endif  // HEADNORM_GEOMETRY_CUH
