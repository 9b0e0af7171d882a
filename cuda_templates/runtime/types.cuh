// Names for plain types, so that the device code needs no header of CUDA's or of the C library.
#pragma once

namespace mpk {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i16 = short;
using i32 = int;

struct bf16 {
  u16 bits;
};

constexpr u32 warp_size = 32;
constexpr u32 all_lanes = 0xffffffffu;
constexpr float infinity = __builtin_bit_cast(float, 0x7f800000u);

template <class T>
__host__ __device__ __forceinline__ constexpr T min_of(T a, T b) { return a < b ? a : b; }

template <class T>
__host__ __device__ __forceinline__ constexpr T max_of(T a, T b) { return a > b ? a : b; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace mpk
