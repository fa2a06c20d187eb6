// Normalizes every row of head_dim elements: RMS or Layer, any dtypes, strides and head_dim.
//
// Set from outside, one set a specialisation:
//   HN_NAME      the kernel's name
//   HN_KIND      rms or layer
//   HN_ROUNDING  once, before_weight, every_op or rstd
//   HN_X, HN_WEIGHT, HN_BIAS   element types; headnorm::None for an absent weight or bias
//   HN_OFFSET    true where the weight has an offset
//   HN_HEAD_DIM  elements a row
//   HN_VEC, HN_ACCESS, HN_PARAMETER_ACCESS, HN_LANES, HN_VECTORS   geometry, see geometry.cuh
//   HN_ROWS      rows a block
//   HN_THREADS   threads a block
//   HN_BLOCKS    such blocks that a multiprocessor must have room for: caps the registers
//   HN_AXES      axes of the grid of rows, see headnorm/rows.cuh
//   HN_INDEX     int where rows and strides in bytes fit in it, else long long
#include "headnorm/norm.cuh"

#if __CUDA_ARCH__ < 800  // a multiprocessor holds no more than 1,024 threads
#undef HN_BLOCKS
#define HN_BLOCKS 1
#endif

extern "C" __global__ void __launch_bounds__(HN_THREADS, HN_BLOCKS) HN_NAME(
    const __grid_constant__ headnorm::Params<headnorm::Accumulate<HN_X>::type, HN_INDEX, HN_AXES>
        p) {
  using namespace headnorm;
  using G = Geometry<HN_HEAD_DIM, HN_VEC, HN_ACCESS, HN_PARAMETER_ACCESS, HN_LANES, HN_VECTORS,
                     HN_THREADS>;
  static_assert(HN_THREADS % kWarp == 0, "shuffles need whole warps");
  static_assert(HN_THREADS >= HN_LANES, "a row's lanes lie in one block");
  // No thread leaves early: all lanes of a warp must reach the shuffles, all threads the barriers.
  const int local_row = threadIdx.x / HN_LANES;
  const int lane = threadIdx.x % HN_LANES;
  // What a warp's last row leaves idle, and rows past the last one, which may not fit in an int but
  // in an unsigned one, have places that nobody reads.
  using Count = Select<(sizeof(HN_INDEX) < 8), unsigned int, long long>::type;
  constexpr bool kNoneIdle = HN_ROWS * HN_LANES % kWarp == 0;
  const Count row = static_cast<Count>(blockIdx.x) * HN_ROWS + local_row;
  const bool row_exists = (kNoneIdle || local_row < HN_ROWS) && row < static_cast<Count>(p.rows);
  const RowPlace place = place_of(p, static_cast<HN_INDEX>(row));
  norm_row<Kind::HN_KIND, Rounding::HN_ROUNDING, HN_X, HN_WEIGHT, HN_OFFSET, HN_BIAS, G>(
      p, place, lane, row_exists);
}
