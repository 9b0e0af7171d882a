// Tensor parallelism: how a rank reaches the others' memory. With one rank all of it is empty.
//
// Everything that a peer writes lies in one symmetric allocation per rank: the event counters, the control block, the
// inboxes. The address of a thing on a peer is the local one plus a constant, which the host works out. Peers are written
// with ordinary stores and signalled with `red.release.sys`; nobody reads a peer's memory.
//
// Order: all threads of a task store, meet at a barrier, and one thread per peer and event signals. A release is cumulative
// over what that thread has seen, so it covers the stores of the others. The waiting side acquires in its own memory and
// then loads through L2, where the peer's stores have arrived.
//
// Where a peer's memory is not mapped here, NVSHMEM's device API takes the place of stores and signals (MPK_NVSHMEM, and then
// `distance` is not used): a task stores into this rank's symmetric memory, and the thread that signals puts that on the peers.
#pragma once
#include "runtime/ptx.cuh"

#ifndef MPK_NVSHMEM
#define MPK_NVSHMEM 0
#endif
#if MPK_NVSHMEM
#include "runtime/shmem.cuh"
#endif

namespace mpk {

#ifdef MPK_RANKS
constexpr u32 num_ranks = MPK_RANKS;
#else
constexpr u32 num_ranks = 1;
#endif

constexpr bool through_nvshmem = MPK_NVSHMEM;
static_assert(num_ranks > 1 || !through_nvshmem, "one rank has no peers");

// Which rank decides what a step is about and talks with the host.
constexpr u32 authority = 0;

template <u32 Ranks>
struct Peers {
  u8* inbox;  // of this rank: one slot per rank and tensor
  u64 distance[Ranks];  // from this rank's symmetric memory to each rank's, modulo 2^64
  u32 rank;
  u32 spare;

  template <class T>
  __device__ __forceinline__ T* on(u32 peer, T* here) const {
    return reinterpret_cast<T*>(reinterpret_cast<u64>(here) + distance[peer]);
  }
};

// A counter that peers signal.
__device__ __forceinline__ u32 look_for_peers(const u32* counter) {
#if MPK_NVSHMEM
  return shmem::look(counter);
#else
  return ptx::load_acquire_system(counter);
#endif
}

// After its wait is over.
__device__ __forceinline__ void arrived_from_peers(const u32* counter) {
#if MPK_NVSHMEM
  shmem::arrived(counter);
#endif
}

template <>
struct Peers<1> {
  static constexpr u32 rank = 0;
  template <class T>
  static __device__ __forceinline__ T* on(u32, T* here) { return here; }
};

}  // namespace mpk

#ifndef MPK_RANKS
namespace plan {
__device__ __forceinline__ constexpr bool from_peers(mpk::u32) { return false; }
}  // namespace plan
#endif
