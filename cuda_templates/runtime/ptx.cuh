// Every PTX instruction that the kernel uses, wrapped once.
//
// sm_90 and later copy with one bulk copy per chunk of the ring that completes on an mbarrier. sm_80 and sm_89 have neither
// bulk copies nor try_wait: there the 32 lanes of the loader copy 16 bytes at a time and each arrives when its copies are done.
#pragma once
#include "runtime/types.cuh"

namespace mpk::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MPK_BULK_COPY 1
#else
#define MPK_BULK_COPY 0
#endif

// Whether warpgroups can give registers to each other: only with an architecture-specific target.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
#define MPK_MOVES_REGISTERS 1
#else
#define MPK_MOVES_REGISTERS 0
#endif

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// --- mbarriers -------------------------------------------------------------------------------------------------------

constexpr u32 copy_arrivals = MPK_BULK_COPY ? 1 : warp_size;  // arrivals that complete the phase of a copy

__device__ __forceinline__ void barrier_init(u64* bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* bar) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(bar)) : "memory");
}

// On sm_90 and later it may sleep in hardware for a while before it says no.
#if MPK_BULK_COPY
#define MPK_PHASE_DONE "mbarrier.try_wait.parity.shared.b64"
#else
#define MPK_PHASE_DONE "mbarrier.test_wait.parity.shared.b64"
#endif

// Whether the phase of that parity is complete.
__device__ __forceinline__ bool barrier_try(u64* bar, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; " MPK_PHASE_DONE " p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
  return done != 0;
}

// The same, and never sleeps.
__device__ __forceinline__ bool barrier_test(u64* bar, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
  return done != 0;
}

// Until the phase of that parity is complete or the flag in shared memory is set. A loop that the compiler does not see: it
// has dozens of these inside its other loops, and those would cost it a fifth of its time.
__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity, const u32* flag) {
  asm volatile("{ .reg .pred p; .reg .u32 set; AGAIN: " MPK_PHASE_DONE " p, [%0], %1; @p bra DONE; "
               "ld.volatile.shared.u32 set, [%2]; setp.eq.u32 p, set, 0; @p bra AGAIN; DONE: }"
               ::"r"(shared_address(bar)), "r"(parity), "r"(shared_address(flag)) : "memory");
}

// Makes freshly initialised mbarriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
#if MPK_BULK_COPY
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// --- copies ----------------------------------------------------------------------------------------------------------

// Starts a copy of `bytes` (a multiple of 16) to shared memory that completes on `bar`. Called by all lanes of one warp, for one copy.
__device__ __forceinline__ void copy_to_shared(void* to, const void* from, u32 bytes, u64* bar, u32 lane) {
#if MPK_BULK_COPY
  if (lane == 0) {
    constexpr u64 evict_first = 0x12F0000000000000ull;  // read once a step, or nearly
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(evict_first) : "memory");
  }
#else
  for (u32 at = lane * 16; at < bytes; at += warp_size * 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 ::"r"(shared_address(static_cast<u8*>(to) + at)), "l"(static_cast<const u8*>(from) + at) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
#endif
}

// Of each lane of one warp that is `mine` a copy of its own, as `copy_to_shared` starts one.
__device__ __forceinline__ void copies_to_shared(void* to, const void* from, u32 bytes, u64* bar, u32 lane, bool mine) {
#if MPK_BULK_COPY
  copy_to_shared(to, from, bytes, bar, mine ? 0 : 1);
#else
  for (u32 lanes = __ballot_sync(all_lanes, mine); lanes; lanes &= lanes - 1) {
    const int whose = __ffs(lanes) - 1;
    copy_to_shared(reinterpret_cast<void*>(__shfl_sync(all_lanes, reinterpret_cast<u64>(to), whose)),
                   reinterpret_cast<const void*>(__shfl_sync(all_lanes, reinterpret_cast<u64>(from), whose)),
                   __shfl_sync(all_lanes, bytes, whose), reinterpret_cast<u64*>(__shfl_sync(all_lanes, reinterpret_cast<u64>(bar), whose)), lane);
  }
#endif
}

__device__ __forceinline__ void prefetch_l2(const void* from, u32 bytes) {
#if MPK_BULK_COPY
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
  for (u32 at = 0; at < bytes; at += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const u8*>(from) + at) : "memory");
#endif
}

__device__ __forceinline__ void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory"); }

// --- events and flags ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void red_release(u32* p, u32 by) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(by) : "memory");
}
__device__ __forceinline__ u32 add_release(u32* p, u32 by) {  // as red_release; returns what was there
  u32 old;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(by) : "memory");
  return old;
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// The same among GPUs: counters that peers signal.
__device__ __forceinline__ void red_release_system(u32* p, u32 by) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(by) : "memory");
}
__device__ __forceinline__ void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
// What was stored before, as far as this thread may know of it, is seen by the copies that it starts.
__device__ __forceinline__ void fence_copies() {
#if MPK_BULK_COPY
  asm volatile("fence.acq_rel.gpu; fence.proxy.async.global;" ::: "memory");
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ __forceinline__ void red_system(u32* p, u32 by) {  // a release after fence_system
  asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(by) : "memory");
}
__device__ __forceinline__ u32 add_release_system(u32* p, u32 by) {
  u32 old;
  asm volatile("atom.release.sys.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(by) : "memory");
  return old;
}
__device__ __forceinline__ u32 load_acquire_system(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u64 load_acquire_system(const u64* p) {
  u64 v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_host(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_host(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_host_release(u32* p, u32 v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ u32 claim_once(u32* p) {  // 0 for the one caller that is first
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(old) : "l"(p) : "memory");
  return old;
}
__device__ __forceinline__ u32 claim(u32* p) {  // a number that no one else gets
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(p) : "memory");
  return old;
}
__device__ __forceinline__ void max_shared(u64* p, u64 v) {
  asm volatile("red.shared.max.u64 [%0], %1;" ::"r"(shared_address(p)), "l"(v) : "memory");
}
__device__ __forceinline__ u32 load_shared_flag(const u32* p) {
  u32 v;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_flag(u32* p, u32 v) {
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}

// --- global memory: data written during this kernel is read from L2, constants may go through L1 ------------------------

__device__ __forceinline__ uint4 load_l2_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_l2_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_l2_4(const void* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u16 load_l2_2(const void* p) {
  u16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_constant_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 load_constant_4(const void* p) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ u16 load_constant_2(const void* p) {
  u16 v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// --- values that other SMs write while this one looks: strong accesses, at the scope of the GPU ---------------------------

__device__ __forceinline__ void look(const void* p, u16& v) {
  asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void look(const void* p, u32& v) {
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void look(const void* p, uint2& v) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
}
__device__ __forceinline__ void look(const void* p, uint4& v) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
}
__device__ __forceinline__ void look(const void* p, u64& v) {
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void show(void* p, u64 v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void show(void* p, u16 v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
__device__ __forceinline__ void show(void* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void show(void* p, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void show(void* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// The same among GPUs.
__device__ __forceinline__ void look_system(const void* p, u32& v) {
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void look_system(const void* p, uint2& v) {
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
}
__device__ __forceinline__ void look_system(const void* p, uint4& v) {
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
}
__device__ __forceinline__ void look_system(const void* p, u64& v) {
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void show_system(void* p, u64 v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void show_system(void* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void show_system(void* p, uint2 v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

// --- shared memory ---------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The same, transposed: of each matrix a thread has values of one column and two rows.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Sixteen bytes, if `wanted`; else `r` stays as it is.
__device__ __forceinline__ void load_shared_16(u32 (&r)[4], u32 address, bool wanted) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3]) : "r"(address), "r"(static_cast<u32>(wanted)) : "memory");
}

// d[16 tokens][8 rows] += a[16 tokens][16] * b[8 rows][16]^T
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16][8] += a[16][8] * b[8][8]
__device__ __forceinline__ void mma_8(float (&d)[4], u32 a0, u32 a1, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
}

// --- barriers among some of the block's threads, clocks ------------------------------------------------------------------

__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ bool named_barrier_any(u32 id, u32 threads, bool mine) {
  u32 any;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.b32 %0, 1, 0, q; }"
               : "=r"(any) : "r"(id), "r"(threads), "r"(static_cast<u32>(mine)) : "memory");
  return any != 0;
}
// Read again where it is asked for: volatile, and no two with different numbers look alike to the compiler.
template <u32 Number>
__device__ __forceinline__ u32 thread_in_block() {
  u32 t;
  asm volatile("{ .reg .u32 unused; mov.u32 unused, %1; mov.u32 %0, %%tid.x; }" : "=r"(t) : "n"(Number) : "memory");
  return t;
}
__device__ __forceinline__ u32 clock() {
  u32 t;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
  return t;
}
__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}
__device__ __forceinline__ u64 cycles() {
  u64 t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)::"memory");
  return t;
}
__device__ __forceinline__ void sleep_ns(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

// Moves registers from producers to workers; called by all warps of a warpgroup.
template <u32 Count>
__device__ __forceinline__ void take_registers() {
#if MPK_MOVES_REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <u32 Count>
__device__ __forceinline__ void give_registers() {
#if MPK_MOVES_REGISTERS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// --- numbers ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ u16 round_bf16(float x) { return static_cast<u16>(pack_bf16(x, 0.f)); }
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float widen_bf16(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }

}  // namespace mpk::ptx
