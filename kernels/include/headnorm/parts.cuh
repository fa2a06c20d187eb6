// Queries, keys and values of the same tokens: up to three arrays with norms of their own.
#ifndef HEADNORM_PARTS_CUH
#define HEADNORM_PARTS_CUH

#include "headnorm/rope.cuh"
#include "headnorm/rows.cuh"

namespace headnorm {

inline constexpr int kParts = 3;

// One of the arrays. All that leads to its heads lies together, since what is cold in the constant
// cache is waited for: 1 token of 32 and 8 heads of 128, bfloat16, cosines given, took 1.64 us on
// an H100, and 1.75 with the strides in an array of their own.
struct alignas(16) Part {
  // Addresses of the first elements; null for a weight or bias that a part has not.
  const char* x;
  char* out;
  const char* weight;
  const char* bias;
  // Bytes from one head to the next.
  long long head_x;
  long long head_out;
  long long head_weight;
  long long head_bias;
};

// One axis of the tokens, strides in bytes; the first one counts the groups of heads of a token
// and has none. Division by size as in headnorm/rows.cuh.
struct TokenAxis {
  long long size;
  unsigned int multiplier;
  unsigned int shift;
  long long x[kParts];
  long long out[kParts];
  long long position;
  long long table;
};

// A call's run-time arguments. The host fills this struct as it stands.
template <typename Acc, int kAxes>
struct PartsParams {
  long long groups;  // of heads, all tokens together
  int heads_per_group;
  int groups_per_block;
  int groups_end[kParts];  // groups of heads of this part and of those before it, of one token
  int num_heads[kParts];
  int rotated[kParts];
  Acc eps[kParts];
  Acc weight_offset[kParts];
  Part part[kParts];
  const char* cosines;
  const char* sines;
  const char* positions;
  long long position_row;  // bytes from one row of positions to the next
  long long table_row;     // bytes from one position's cosines to the next's
  long long max_position;  // rows of the tables
  TokenAxis axis[kAxes];   // innermost first
};

// A group's token: where it stands along each axis. Offsets are worked out where they are needed,
// for they would take more registers than the arithmetic takes time.
template <typename Call, int kAxes>
struct Token {
  // As in headnorm/rows.cuh few axes mean 32-bit arithmetic.
  using Index = typename Select<(kAxes <= kFewAxes), unsigned int, long long>::type;
  const Call& p;
  Index index[kAxes];

  __device__ __forceinline__ Token(const Call& call, long long group) : p(call) {
    Index rest = static_cast<Index>(group);
#pragma unroll
    for (int a = 0; a + 1 < kAxes; ++a) {
      const TokenAxis& axis = p.axis[a];
      Index quotient;
      if constexpr (kAxes <= kFewAxes) {
        quotient = (__umulhi(rest, axis.multiplier) + rest) >> axis.shift;
      } else {
        quotient = rest / axis.size;
      }
      index[a] = rest - quotient * static_cast<Index>(axis.size);
      rest = quotient;
    }
    index[kAxes - 1] = rest;
  }

  __device__ __forceinline__ int group_of_token() const { return static_cast<int>(index[0]); }

  // Bytes to the token in an array whose strides `stride` tells of an axis.
  template <typename Stride>
  __device__ __forceinline__ long long offset(Stride stride) const {
    long long sum = 0;
#pragma unroll
    for (int a = 1; a < kAxes; ++a) {
      sum += static_cast<long long>(index[a]) * stride(p.axis[a]);
    }
    return sum;
  }
};

}  // namespace headnorm

#endif  // HEADNORM_PARTS_CUH
