// In place of cuda_templates/runtime/ptx.cuh where all roles of an SM run on the host: lanes are threads, an SM is a process, and
// what SMs share lies in memory that the processes share. A warp has as many lanes as its role needs.
#pragma once
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "cuda.h"
#include "runtime/types.cuh"


namespace mpk::host {
// Threads that meet, again and again.
struct Meeting {
  u32 size = 0, arrived = 0, round = 0, votes[2] = {};

  // How many voted yes.
  u32 meet(bool vote) {
    const u32 now = __atomic_load_n(&round, __ATOMIC_ACQUIRE);
    if (vote) __atomic_add_fetch(&votes[now % 2], 1, __ATOMIC_ACQ_REL);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&votes[1 - now % 2], 0, __ATOMIC_RELEASE);
      __atomic_store_n(&arrived, 0, __ATOMIC_RELEASE);
      __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
      std::atomic_ref(round).notify_all();
    }
    std::atomic_ref(round).wait(now);
    return __atomic_load_n(&votes[now % 2], __ATOMIC_ACQUIRE);
  }
};
struct Warp : Meeting {
  u64 values[32];
};
struct Dim {
  u32 x;
};
inline void rest() { usleep(50); }  // where a GPU would look again at once: there are more threads than cores
inline thread_local Warp* warp;
inline thread_local u32 lane;
inline Meeting workers;

// What the loader asked for, in order.
struct Asked {
  const void* from;
  bool copied;  // else brought into L2
};
inline std::vector<Asked> asked;
inline void note(const void* from, bool copied) {
  static std::mutex one;
  const std::lock_guard<std::mutex> held(one);
  asked.push_back({from, copied});
}
}  // namespace mpk::host

inline thread_local mpk::host::Dim threadIdx;
inline mpk::host::Dim blockIdx, gridDim;
inline void __syncthreads() {}
inline void __syncwarp() { mpk::host::warp->meet(false); }
inline bool __any_sync(unsigned, bool x) { return mpk::host::warp->meet(x) != 0; }
inline bool __all_sync(unsigned, bool x) { return mpk::host::warp->meet(x) == mpk::host::warp->size; }
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  std::memcpy(&mpk::host::warp->values[mpk::host::lane], &x, sizeof(T));
  __syncwarp();
  T found;
  std::memcpy(&found, &mpk::host::warp->values[from], sizeof(T));
  __syncwarp();
  return found;
}
template <class T>
T __shfl_xor_sync(unsigned all, T x, int lanes) { return __shfl_sync(all, x, mpk::host::lane ^ lanes); }

namespace mpk::ptx {

constexpr u32 copy_arrivals = 1;

// Of an mbarrier: arrivals to come in this phase, those of every phase, and the phase.
struct Phase {
  u16 left, all;
  u32 number;
};
inline void barrier_init(u64* bar, u32 arrivals) {
  const auto n = static_cast<u16>(arrivals);
  *bar = __builtin_bit_cast(u64, Phase{n, n, 0});
}
inline void barrier_arrive(u64* bar) {
  u64 seen = __atomic_load_n(bar, __ATOMIC_ACQUIRE);
  while (true) {
    Phase next = __builtin_bit_cast(Phase, seen);
    if (--next.left == 0) next = {next.all, next.all, next.number + 1};
    if (__atomic_compare_exchange_n(bar, &seen, __builtin_bit_cast(u64, next), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
  }
}
inline bool barrier_test(u64* bar, u32 parity) {
  return __builtin_bit_cast(Phase, __atomic_load_n(bar, __ATOMIC_ACQUIRE)).number % 2 != parity;
}
inline bool barrier_try(u64* bar, u32 parity) {
  if (barrier_test(bar, parity)) return true;
  host::rest();
  return false;
}
inline u32 load(const u32* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void barrier_wait(u64* bar, u32 parity, const u32* flag) {
  while (!barrier_try(bar, parity) && !load(flag)) {}
}
inline void fence_barrier_init() {}
inline void copies_to_shared(void* to, const void* from, u32 bytes, u64* bar, u32, bool mine) {
  if (!mine) return;
  host::note(from, true);
  std::memcpy(to, from, bytes);
  barrier_arrive(bar);
}
inline void prefetch_l2(const void* from, u32) { host::note(from, false); }
inline void fence_block() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
inline float reciprocal(float x) { return 1.f / x; }
inline void fence_copies() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
inline void red_release(u32* p, u32 by) { __atomic_add_fetch(p, by, __ATOMIC_ACQ_REL); }
inline u32 add_release(u32* p, u32 by) { return __atomic_fetch_add(p, by, __ATOMIC_ACQ_REL); }
inline u32 claim(u32* p) { return __atomic_fetch_add(p, 1, __ATOMIC_RELAXED); }
inline void red_release_system(u32* p, u32 by) { red_release(p, by); }
inline u32 add_release_system(u32* p, u32 by) { return add_release(p, by); }
inline u32 polled(const u32* p) {
  host::rest();
  return load(p);
}
inline u32 load_acquire(const u32* p) { return polled(p); }
inline u32 load_acquire_system(const u32* p) { return polled(p); }
inline u32 load_relaxed(const u32* p) { return load(p); }
inline u32 load_host(const u32* p) { return load(p); }
inline void store_host_release(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline u32 claim_once(u32* p) {
  u32 none = 0;
  __atomic_compare_exchange_n(p, &none, 1u, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return none;
}
inline u32 load_shared_flag(const u32* p) { return polled(p); }
inline void store_shared_flag(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline u32 load_constant_4(const void* p) { return *static_cast<const u32*>(p); }
inline void look(const void* p, u64& v) {
  host::rest();
  v = __atomic_load_n(static_cast<const u64*>(p), __ATOMIC_ACQUIRE);
}
inline u32 shared_address(const void*) { return 0; }
inline void look_system(const void* p, u64& v) { look(p, v); }
inline void named_barrier(u32, u32) { host::workers.meet(false); }
inline bool named_barrier_any(u32, u32, bool mine) { return host::workers.meet(mine) != 0; }
template <u32 Number> u32 thread_in_block() { return threadIdx.x; }
inline u64 now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}
inline u32 clock() { return static_cast<u32>(now_ns()); }
inline u64 cycles() { return now_ns(); }
inline void sleep_ns(u32 ns) {
  usleep(ns / 16);  // hundreds of them: what they are to mix up takes that long here
}
template <u32 Count> void take_registers() {}
template <u32 Count> void give_registers() {}

}  // namespace mpk::ptx
