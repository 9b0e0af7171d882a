// Peers through NVSHMEM's device API: what the kernel uses where their memory is not mapped here (MPK_NVSHMEM).
//
// A counter of an event that all ranks signal is a 64-bit word whose lower half is the counter of the other transport: it
// starts at the same address, and the host need not know. All its signals go through NVSHMEM, this rank's own too, so that
// they add up whatever carries them.
//
// NVSHMEM's functions are compiled into the kernel instead of linked to it: ptxas moves no registers between warps in code
// that is linked, and without that the workers' registers spill. Its IBGDA transport is left out, which NVRTC cannot compile;
// the host refuses to start with it. The small headers that NVSHMEM's include lie in cuda_templates/nvshmem.
#pragma once
#include "non_abi/nvshmem_build_options.h"
#undef NVSHMEM_IBGDA_SUPPORT
#define NVSHMEM_ENABLE_ALL_DEVICE_INLINING
#include "device/nvshmem_defines.h"
#include "runtime/ptx.cuh"

// The host's library looks for this and for nvshmemi_device_state_d, which it fills in, in a module that it is told of.
__constant__ nvshmemi_version_t nvshmemi_device_lib_version_d = {
    NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};

namespace mpk::shmem {

__device__ __forceinline__ uint64_t* word(u32* counter) { return reinterpret_cast<uint64_t*>(counter); }

// Copies `bytes` at `here`, of symmetric memory, to the same place on a peer. Returns before they have been read.
__device__ __forceinline__ void put(void* here, u32 bytes, u32 peer) { nvshmem_putmem_nbi(here, here, bytes, peer); }

// The same, and when they are there, signals.
__device__ __forceinline__ void put_and_signal(void* here, u32 bytes, u32* counter, u32 peer) {
  nvshmem_putmem_signal_nbi(here, here, bytes, word(counter), 1, NVSHMEM_SIGNAL_ADD, peer);
}

// What this thread put on a rank comes before what it puts there from now on.
__device__ __forceinline__ void order() { nvshmem_fence(); }

// Signals, after what this thread put on that rank.
__device__ __forceinline__ void signal(u32* counter, u32 rank) {
  order();
  put_and_signal(counter, 0, counter, rank);
}

__device__ __forceinline__ u32 look(const u32* counter) {
  return static_cast<u32>(ptx::load_acquire_system(reinterpret_cast<const u64*>(counter)));
}

// A waiter has seen what it waited for: where a network card writes data and signals, makes the data visible too.
__device__ __forceinline__ void arrived(const u32* counter) {
  nvshmem_ulonglong_wait_until(reinterpret_cast<u64*>(const_cast<u32*>(counter)), NVSHMEM_CMP_GE, 0);
}

// All that this rank put has been read and has arrived: nothing comes after the kernel has ended.
__device__ __forceinline__ void complete() { nvshmem_quiet(); }

}  // namespace mpk::shmem
