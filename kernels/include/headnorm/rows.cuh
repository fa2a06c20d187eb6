// From the number of a row to its places in memory.
#ifndef HEADNORM_ROWS_CUH
#define HEADNORM_ROWS_CUH

namespace headnorm {

inline constexpr int kFewAxes = 3;

// One axis of the grid of rows. A step along it that ends a run along the axis inside of it goes
// back to that one's start: with strides of 10 and 256 bytes and 3 rows inside, x is 256 - 3 * 10.
// So an array's offset is a sum of products with whole quotients, and no remainder is needed. Steps
// are in bytes and may be zero or negative: a weight shared by all heads is one whose stride along
// the heads is zero. Index is int where all rows and steps fit in it: then one instruction
// multiplies and adds them.
template <typename Index>
struct RowAxis {
  Index size;
  Index x;
  Index out;
  Index weight;
  Index bias;
  // Division by size of a number below 2^31 (Granlund and Montgomery 1994, figure 4.1):
  // quotient = (high32(number * multiplier) + number) >> shift.
  unsigned int multiplier;
  unsigned int shift;
};

// A call's run-time arguments. The host fills this struct as it stands.
template <typename Acc, typename Index, int kAxes>
struct Params {
  const char* x;
  char* out;
  const char* weight;
  const char* bias;
  long long rows;
  RowAxis<Index> axis[kAxes];  // innermost first
  Acc eps;
  Acc weight_offset;
};

struct RowPlace {
  long long x = 0;
  long long out = 0;
  long long weight = 0;
  long long bias = 0;

  template <typename Index>
  __device__ __forceinline__ void step(const RowAxis<Index>& axis, Index index) {
    const long long steps = index;
    x += steps * axis.x;
    out += steps * axis.out;
    weight += steps * axis.weight;
    bias += steps * axis.bias;
  }
};

// With kFewAxes or fewer there are exactly kAxes, those that are not needed innermost and of size
// 1, and Index is int unless one axis is all: then no 64-bit division takes registers from the
// rows.
template <typename Acc, typename Index, int kAxes>
__device__ __forceinline__ RowPlace place_of(const Params<Acc, Index, kAxes>& p, Index row) {
  RowPlace place;
  place.step(p.axis[0], row);
#pragma unroll kAxes <= kFewAxes ? kAxes : 1
  for (int a = 1; a < kAxes; ++a) {
    const RowAxis<Index>& inside = p.axis[a - 1];
    if constexpr (kAxes <= kFewAxes) {
      const unsigned int number = row;
      row = (__umulhi(number, inside.multiplier) + number) >> inside.shift;
    } else {
      row /= inside.size;
    }
    place.step(p.axis[a], row);
  }
  return place;
}

}  // namespace headnorm

#endif  // HEADNORM_ROWS_CUH
