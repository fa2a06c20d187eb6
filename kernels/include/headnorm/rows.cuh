// From the number of a row to its places in memory.
#ifndef HEADNORM_ROWS_CUH
#define HEADNORM_ROWS_CUH

namespace headnorm {

inline constexpr int kFewAxes = 3;

// One axis of the grid of rows. Strides are in bytes and may be zero or negative: a weight shared
// by all heads is one whose stride along the heads is zero.
struct RowAxis {
  long long size;
  long long x;
  long long out;
  long long weight;
  long long bias;
  // Division by size of a number below 2^31 (Granlund and Montgomery 1994, figure 4.1):
  // quotient = (high32(number * multiplier) + number) >> shift.
  unsigned int multiplier;
  unsigned int shift;
};

// A call's run-time arguments. The host fills this struct as it stands.
template <typename Acc, int kAxes>
struct Params {
  const char* x;
  char* out;
  const char* weight;
  const char* bias;
  long long rows;
  RowAxis axis[kAxes];  // innermost first
  int rows_per_block;
  Acc eps;
  Acc weight_offset;
};

struct RowPlace {
  long long x = 0;
  long long out = 0;
  long long weight = 0;
  long long bias = 0;

  __device__ __forceinline__ void step(const RowAxis& axis, long long index) {
    x += index * axis.x;
    out += index * axis.out;
    weight += index * axis.weight;
    bias += index * axis.bias;
  }
};

// With kFewAxes or fewer there are exactly kAxes, those that are not needed innermost and of size
// 1, and fewer than 2^31 rows unless one axis is all: then every index here is known to the
// compiler, and no 64-bit division takes registers from the rows.
template <typename Acc, int kAxes>
__device__ __forceinline__ RowPlace place_of(const Params<Acc, kAxes>& p, long long row) {
  RowPlace place;
  if constexpr (kAxes == 1) {
    place.step(p.axis[0], row);
  } else if constexpr (kAxes <= kFewAxes) {
    unsigned int rest = static_cast<unsigned int>(row);
#pragma unroll
    for (int a = 0; a + 1 < kAxes; ++a) {
      const unsigned int quotient =
          (__umulhi(rest, p.axis[a].multiplier) + rest) >> p.axis[a].shift;
      place.step(p.axis[a], rest - quotient * static_cast<unsigned int>(p.axis[a].size));
      rest = quotient;
    }
    place.step(p.axis[kAxes - 1], rest);
  } else {
    long long rest = row;
    for (int a = 0; a + 1 < kAxes; ++a) {
      const long long quotient = rest / p.axis[a].size;
      place.step(p.axis[a], rest - quotient * p.axis[a].size);
      rest = quotient;
    }
    place.step(p.axis[kAxes - 1], rest);
  }
  return place;
}

}  // namespace headnorm

#endif  // HEADNORM_ROWS_CUH
