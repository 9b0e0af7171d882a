// In place of cuda_templates/runtime/ptx.cuh where device code runs on the host, as the one thread of its warp and of its block.
// Barriers of the ring count; what computes does nothing, since no number decides which chunks a task takes.
#pragma once
#include "cuda.h"
#include "runtime/types.cuh"

struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float fmaf(float a, float b, float c) { return a * b + c; }
inline float fmaxf(float a, float b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return x; }
template <class T> T __shfl_xor_sync(unsigned, T x, int) { return x; }
template <class T> T __shfl_sync(unsigned, T x, int) { return x; }
inline bool __all_sync(unsigned, bool x) { return x; }
inline bool __any_sync(unsigned, bool x) { return x; }
inline void __syncwarp() {}

namespace mpk::host {
inline u32 taken, freed;  // chunks of the ring
inline u64 *full, *empty, *end;  // its barriers
inline const void* prefetched;  // what was asked for last
}  // namespace mpk::host

namespace mpk::ptx {

inline void barrier_wait(u64* bar, u32, const u32*) { host::taken += bar >= host::full && bar < host::empty; }
inline void barrier_arrive(u64* bar) { host::freed += bar >= host::empty && bar < host::end; }
inline bool barrier_try(u64*, u32) { return true; }
inline bool barrier_test(u64*, u32) { return true; }
inline void copies_to_shared(void*, const void*, u32, u64*, u32, bool) {}
inline void prefetch_l2(const void* from, u32) { host::prefetched = from; }
inline float reciprocal(float x) { return 1.f / x; }
inline void fence_copies() {}
inline void fence_block() {}
inline u32 claim(u32* p) { return (*p)++; }
inline u32 load_shared_flag(const u32* p) { return *p; }
inline void store_shared_flag(u32* p, u32 v) { *p = v; }
inline u32 shared_address(const void*) { return 0; }
inline void load_shared_16(u32 (&)[4], u32, bool) {}
inline void load_matrices_transposed(u32 (&)[4], u32) {}
inline void mma(float (&)[4], const u32 (&)[4], u32, u32) {}
inline void mma_8(float (&)[4], u32, u32, u32) {}
inline void named_barrier(u32, u32) {}
template <u32 Number> u32 thread_in_block() { return 128; }
inline u32 clock() { return 0; }
inline void red_release(u32*, u32) {}
inline void red_release_system(u32*, u32) {}
inline u32 load_acquire(const u32* p) { return *p; }
inline u32 load_acquire_system(const u32* p) { return *p; }
inline u16 load_constant_2(const void*) { return 0; }
inline uint2 load_constant_8(const void*) { return {}; }
inline u16 load_l2_2(const void*) { return 0; }
inline u32 load_l2_4(const void*) { return 0; }
inline uint2 load_l2_8(const void*) { return {}; }
inline uint4 load_l2_16(const void*) { return {}; }
template <class V> void look(const void*, V&) {}
template <class V> void show(void*, V) {}
inline u32 pack_bf16(float, float) { return 0; }
inline u16 round_bf16(float) { return 0; }
inline float low_bf16(u32) { return 0.f; }
inline float high_bf16(u32) { return 0.f; }
inline float widen_bf16(u16) { return 0.f; }
inline float exp_fast(float) { return 1.f; }

}  // namespace mpk::ptx
