// As threads/runtime/ptx.cuh, with what tasks compute with: all 32 lanes of a warp, shared memory by address, tensor cores.
#pragma once
#include <cmath>

#define shared_address no_shared_address
#include "../../threads/runtime/ptx.cuh"
#undef shared_address
#define __builtin_assume(x)

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace mpk {
extern u8 shared_memory[];
}
namespace mpk::host {
// What the lanes of a warp give one of its instructions.
struct Operands {
  u32 a[32][4], b[32][2], address[32];
};
inline thread_local Operands* operands;
}  // namespace mpk::host

namespace mpk::ptx {

inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const u8*>(p) - shared_memory); }
inline u32 word_at(u32 address) {
  u32 word;
  std::memcpy(&word, shared_memory + address, 4);
  return word;
}
inline void load_matrices(u32 (&r)[4], u32 address) {
  host::Operands& all = *host::operands;
  all.address[host::lane] = address;
  __syncwarp();
  for (u32 m = 0; m < 4; ++m) r[m] = word_at(all.address[m * 8 + host::lane / 4] + host::lane % 4 * 4);
  __syncwarp();
}
// Each lane has two rows of one column.
inline void load_matrices_transposed(u32 (&r)[4], u32 address) {
  host::Operands& all = *host::operands;
  all.address[host::lane] = address;
  __syncwarp();
  const auto at = [&](u32 m, u32 row) { return word_at(all.address[m * 8 + row] + host::lane / 8 * 4) >> host::lane / 4 % 2 * 16 & 0xffff; };
  for (u32 m = 0; m < 4; ++m) r[m] = at(m, host::lane % 4 * 2) | at(m, host::lane % 4 * 2 + 1) << 16;
  __syncwarp();
}
inline void load_shared_16(u32 (&r)[4], u32 address, bool wanted) {
  if (wanted) std::memcpy(r, shared_memory + address, 16);
}
inline float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float widen_bf16(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
inline u16 round_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 pack_bf16(float low, float high) { return round_bf16(low) | static_cast<u32>(round_bf16(high)) << 16; }

// d[16][8] += a[16][16] * b[8][16]^T. Lane l has of a the rows l / 4 and the eighth after it, of b the row l / 4, each pair of
// columns number l % 4 and the fourth after it; of d those rows of a by pair l % 4 of b's.
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  host::Operands& all = *host::operands;
  std::memcpy(all.a[host::lane], a, sizeof(a));
  all.b[host::lane][0] = b0, all.b[host::lane][1] = b1;
  __syncwarp();
  for (u32 i = 0; i < 4; ++i) {
    const u32 row = host::lane / 4, column = host::lane % 4 * 2 + i % 2;
    for (u32 k = 0; k < 8; ++k) {  // pairs of columns
      const u32 x = all.a[row * 4 + k % 4][i / 2 + k / 4 * 2], y = all.b[column * 4 + k % 4][k / 4];
      d[i] += low_bf16(x) * low_bf16(y) + high_bf16(x) * high_bf16(y);
    }
  }
  __syncwarp();
}

// d[16][8] += a[16][8] * b[8][8]^T.
inline void mma_8(float (&d)[4], u32 a0, u32 a1, u32 b) { mma(d, {a0, a1, 0, 0}, b, 0); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float exp_fast(float x) { return std::exp(x); }

template <class V>
V loaded(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
inline u16 load_l2_2(const void* p) { return loaded<u16>(p); }
inline u32 load_l2_4(const void* p) { return loaded<u32>(p); }
inline uint2 load_l2_8(const void* p) { return loaded<uint2>(p); }
inline uint4 load_l2_16(const void* p) { return loaded<uint4>(p); }
inline u16 load_constant_2(const void* p) { return loaded<u16>(p); }
inline uint2 load_constant_8(const void* p) { return loaded<uint2>(p); }
template <class V>
void look(const void* p, V& v) {
  v = loaded<V>(p);
}
template <class V>
void show(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
inline void max_shared(u64*, u64) {}

}  // namespace mpk::ptx
