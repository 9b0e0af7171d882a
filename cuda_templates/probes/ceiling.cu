// How fast the GPU's memory can be read: every SM streams its part of a block of memory through a ring in shared memory, as the
// kernel's loaders do, and looks at every byte.
//
// One warp copies, eight read. Shared memory: `slots` chunks. All of the ring may be in flight.
#include "runtime/ptx.cuh"

namespace mpk {

constexpr u32 max_slots = 64, reader_warps = 8, reader_threads = reader_warps * warp_size;

struct Ring {
  u32 slots, slot = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace mpk

// `chunks` of `chunk_bytes` for each block: neighbouring blocks' chunks alternate (interleaved), or each block has its own range.
extern "C" __global__ void __launch_bounds__(mpk::reader_threads + mpk::warp_size, 1)
    stream(const mpk::u8* from, mpk::u64 chunks, mpk::u32 chunk_bytes, mpk::u32 slots, mpk::u32 interleaved, mpk::u32* out) {
  using namespace mpk;
  extern __shared__ __align__(128) u8 memory[];
  __shared__ u64 full[max_slots], empty[max_slots];
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < slots; ++i) {
      ptx::barrier_init(&full[i], ptx::copy_arrivals);
      ptx::barrier_init(&empty[i], reader_warps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  Ring ring{slots};
  const u32 lane = threadIdx.x % warp_size;
  if (threadIdx.x >= reader_threads) {
    for (u64 i = 0; i < chunks; ++i, ring.next()) {
      while (!ptx::barrier_try(&empty[ring.slot], ring.parity ^ 1)) {}
      const u64 at = interleaved ? i * gridDim.x + blockIdx.x : blockIdx.x * chunks + i;
      ptx::copy_to_shared(memory + ring.slot * chunk_bytes, from + at * chunk_bytes, chunk_bytes, &full[ring.slot], lane);
      __syncwarp();
    }
    return;
  }
  u32 seen = 0;
  for (u64 i = 0; i < chunks; ++i, ring.next()) {
    while (!ptx::barrier_try(&full[ring.slot], ring.parity)) {}
    const uint4* chunk = reinterpret_cast<const uint4*>(memory + ring.slot * chunk_bytes);
    for (u32 j = threadIdx.x; j < chunk_bytes / 16; j += reader_threads) {
      const uint4 v = chunk[j];
      seen += v.x ^ v.y ^ v.z ^ v.w;
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&empty[ring.slot]);
  }
  atomicAdd(out, seen);  // nothing that is read may be left out
}
