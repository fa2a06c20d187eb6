// Normalizes the heads of queries, keys and values and rotates them by their positions, in one
// launch.
//
// A group of lanes keeps the cosines and sines of one token and goes through several of its heads.
//
// Set from outside, one set a specialisation, beside those of head_norm.cu:
//   HN_ROPE         none, half, half_flipped or interleaved
//   HN_ROPE_FIRST   true where the norm comes after the rotary embedding
//   HN_ROTARY_DIM   elements that rotate, first ones first
//   HN_EVERY_OP     true where every product and sum is rounded to x's type
//   HN_TABLE        type of cosines and sines
//   HN_WHOLE_ROWS   true where they have an entry for each element, not for each pair
//   HN_TABLE_ACCESS entries moved by one load
//   HN_POSITION     type of positions; headnorm::None where cosines and sines are the tokens' own
//   HN_SECTIONS     none, chunks or interleaved, of HN_SECTION_SIZES frequencies
//   HN_AXES         axes of the tokens, and one for the groups of a token
//   HN_FOLD         lanes of head_norm.cu whose work a lane does: 1 or 2
//   HN_OFFSET       true where a weight has an offset
//   HN_ALIKE        true where all parts rotate, and all or none have a weight, and a bias
#include "headnorm/norm.cuh"
#include "headnorm/parts.cuh"
#include "headnorm/rope.cuh"

namespace headnorm {

using T = HN_X;
using Acc = Accumulate<T>::type;
using G =
    Geometry<HN_HEAD_DIM, HN_VEC, HN_ACCESS, HN_PARAMETER_ACCESS, HN_LANES, HN_VECTORS, HN_THREADS>;
using R = Rope<RopeStyle::HN_ROPE, HN_ROTARY_DIM, HN_EVERY_OP, HN_WHOLE_ROWS, Sections::HN_SECTIONS,
               HN_SECTION_SIZES>;
using Call = PartsParams<Acc, HN_AXES>;
using Place = Token<Call, HN_AXES>;
using Row = Vec<T, HN_VEC>[HN_VECTORS];
using Values = Acc[HN_VECTORS][HN_VEC];
constexpr bool kRope = R::kStyle != RopeStyle::none;

// What a part's values are multiplied by and shifted by: by the weight with its offset and the
// bias. 1 and -0 change nothing where a part has none.
template <typename W, typename B>
struct Scales {
  static constexpr Rounding kRounding = Rounding::HN_ROUNDING;
  static constexpr bool kTwo = kWeighsTwo<kRounding, T, W, HN_OFFSET, B, G::kVec>;
  Vec<W, G::kVec> weights[G::kVectors];
  Values scale;
  Values shift;

  __device__ __forceinline__ void load(const Call& p, int part, int head, int lane, bool exists) {
    const char* const weight = p.part[part].weight;
    const char* const bias = p.part[part].bias;
    Vec<B, G::kVec> biases[G::kVectors];
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      const int first = G::first_element(0, j, lane);
      load_parameters<G>(weights[j],
                         reinterpret_cast<const W*>(weight + head * p.part[part].head_weight),
                         first, exists && (HN_ALIKE || weight != nullptr));
      load_parameters<G>(biases[j],
                         reinterpret_cast<const B*>(bias + head * p.part[part].head_bias), first,
                         exists && (HN_ALIKE || bias != nullptr));
    }
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < G::kVec; ++i) {
        if constexpr (kTwo) {
          weights[j].element[i] =
              !HN_ALIKE && weight == nullptr ? Round<W>::from(1) : weights[j].element[i];
        } else if constexpr (kPresent<W>) {
          Acc w = widen<Acc>(weights[j].element[i]);
          if (HN_OFFSET && p.weight_offset[part] != 0) {
            w += p.weight_offset[part];  // 0 would take the sign of what is flushed
          }
          scale[j][i] = !HN_ALIKE && weight == nullptr ? Acc(1) : w;
        }
        if constexpr (kPresent<B>) {
          const Acc b = widen<Acc>(biases[j].element[i]);
          shift[j][i] = !HN_ALIKE && bias == nullptr ? -Acc(0) : b;
        }
      }
    }
  }

  __device__ __forceinline__ Vec<T, G::kVec> apply(const Acc (&value)[G::kVec], Acc mean,
                                                   Acc inverse, int j) const {
    if constexpr (kTwo) {
      return weighed<kRounding>(value, mean, inverse, weights[j]);
    } else {
      return finished<kRounding, T, kPresent<W>, kPresent<B>>(value, mean, inverse, scale[j],
                                                              shift[j]);
    }
  }
};

// A row's elements as they were loaded, or as a model's rotary embedding rounded them.
template <typename S>
__device__ __forceinline__ void normalize(Row& row, const S& scales, Acc eps, int lane,
                                          Acc (&partial)[kSums][kWarp]) {
  Values value;
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
    widen_to(value[j], row[j].element);
  }
  Acc mean = 0;
  if constexpr (Kind::HN_KIND == Kind::layer) {
    Acc sum[HN_FOLD] = {};
    add_values<G>(sum, value);
    mean = mean_of<G>(folded(sum), partial[0]);
  }
  constexpr bool kCorrected = kCorrectsMean<Kind::HN_KIND, T, G>;
  Acc squares[HN_FOLD];
  Acc differences[HN_FOLD];
  sum_squares<Kind::HN_KIND, kCorrected, G>(squares, differences, value, mean, 0, lane);
  if constexpr (kCorrected) {
    mean += mean_of<G>(folded(differences), partial[2]);
  }
  const Acc inverse =
      inverse_of<Kind::HN_KIND, Rounding::HN_ROUNDING, T, G>(folded(squares), eps, partial[1]);
#pragma unroll
  for (int j = 0; j < G::kVectors; ++j) {
    row[j] = scales.apply(value[j], mean, inverse, j);
  }
}

// Bytes to the cosines of the token, for each row of positions.
template <typename Position>
__device__ __forceinline__ void find_rows(long long (&row)[R::kPositionRows], const Call& p,
                                          const Place& token, bool exists) {
#pragma unroll
  for (int r = 0; r < R::kPositionRows; ++r) {
    if constexpr (kPresent<Position>) {
      long long position = 0;
      if (exists) {
        const long long at = token.offset([](const TokenAxis& axis) { return axis.position; });
        position = *reinterpret_cast<const Position*>(p.positions + at + r * p.position_row);
      }
      // Positions are data of the device: one past the tables must not read past them.
      position = position < 0 ? 0 : position;
      position = position < p.max_position ? position : p.max_position - 1;
      row[r] = position * p.table_row;
    } else {
      row[r] = token.offset([](const TokenAxis& axis) { return axis.table; });
    }
  }
}

}  // namespace headnorm

extern "C" __global__ void __launch_bounds__(HN_THREADS)
    HN_NAME(const __grid_constant__ headnorm::Call p) {
  using namespace headnorm;
  static_assert(G::kTiles == 1, "a row lies in registers");
  static_assert(HN_THREADS % kWarp == 0, "shuffles need whole warps");
  static_assert(HN_THREADS >= HN_LANES, "a row's lanes lie in one block");
  constexpr int kExchanged = kRope && !R::kWithinLane<G> ? G::kThreads / G::kLanes * G::kTile : 1;
  __shared__ Acc partial[kSums][kWarp];
  __shared__ alignas(16) unsigned char moved[Mover<T, G>::kStage * sizeof(T)];
  __shared__ alignas(16) unsigned char exchanged[kExchanged * sizeof(T)];

  // No thread leaves early: all lanes of a warp must reach the shuffles, all threads the barriers.
  const int local = threadIdx.x / HN_LANES;
  const int lane = threadIdx.x % HN_LANES;
  const long long group = static_cast<long long>(blockIdx.x) * p.groups_per_block + local;
  const bool exists = local < p.groups_per_block && group < p.groups;
  const Place token(p, exists ? group : 0);
  const int among = token.group_of_token();
  const int part = among < p.groups_end[0] ? 0 : among < p.groups_end[1] ? 1 : 2;
  const Part& array = p.part[part];
  const int before = part == 0 ? 0 : p.groups_end[part - 1];
  const int first_head = (among - before) * p.heads_per_group;
  const int count = exists ? p.num_heads[part] - first_head : 0;
  const char* x = array.x + first_head * array.head_x +
                  token.offset([part](const TokenAxis& axis) { return axis.x[part]; });
  char* out = array.out + first_head * array.head_out +
              token.offset([part](const TokenAxis& axis) { return axis.out[part]; });
  T* const stage = reinterpret_cast<T*>(exchanged) + (kExchanged > 1 ? local * G::kTile : 0);

  const auto load = [&](Row& row, bool there) {
    const Mover<T, G> mover{reinterpret_cast<T*>(moved), lane, there};
    mover.load(row, reinterpret_cast<const T*>(x), 0);
  };

  Row next;
  load(next, 0 < count);
  Rotation<T, HN_TABLE, R, G> rotation;
  if constexpr (kRope) {
    long long rows[R::kPositionRows];
    find_rows<HN_POSITION>(rows, p, token, exists);
    rotation.template load<HN_TABLE_ACCESS>(p.cosines, p.sines, rows, lane, exists);
  }
  Scales<HN_WEIGHT, HN_BIAS> scales;
  scales.load(p, part, first_head, lane, 0 < count);
  const bool scales_differ = array.head_weight != 0 || array.head_bias != 0;
  for (int i = 0; i < p.heads_per_group; ++i) {
    Row row;
#pragma unroll
    for (int j = 0; j < G::kVectors; ++j) {
      row[j] = next[j];
    }
    // The next head is on its way while this one is worked on.
    x += array.head_x;
    if (i + 1 < p.heads_per_group) {
      load(next, i + 1 < count);
    }
    if (scales_differ && i > 0) {
      scales.load(p, part, first_head + i, lane, i < count);
    }
    if constexpr (kRope && HN_ROPE_FIRST) {
      rotate<HN_ALIKE>(row, rotation, stage, lane, p.rotated[part]);
    }
    normalize(row, scales, p.eps[part], lane, partial);
    if constexpr (kRope && !HN_ROPE_FIRST) {
      rotate<HN_ALIKE>(row, rotation, stage, lane, p.rotated[part]);
    }
    const Mover<T, G> mover{reinterpret_cast<T*>(moved), lane, i < count};
    mover.store(row, reinterpret_cast<T*>(out), 0);
    out += array.head_out;
    row_barrier<G::kLanes>();  // `partial` and `stage` are written again
  }
}
