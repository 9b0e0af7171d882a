// What fetching ahead into L2 brings where memory is what all wait for: the figures of step 25 in decode.md.
//
//   nvcc -arch=sm_90a -O3 -std=c++17 -I cuda_templates -o l2_ahead benchmarks/l2_ahead.cu && ./l2_ahead
//
// Every SM streams chunks through a ring, as the kernel's loader does. First some of four chunks come from L2 all the time; then SMs meet
// after each so many chunks, stand still for a while, and meanwhile fetch ahead.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "runtime/ptx.cuh"

using namespace mpk;

constexpr u32 slots = 11, chunk_bytes = 16384, clocks_per_us = 1980;

enum When { never, landed, at_once, always };  // landed: the ring is full, and all that was asked for has come

struct Run {
  u32 rounds, chunks;  // between two meetings
  u32 stall_us = 0, flight = 5;  // copies under way at once
  When when = never;
  u32 ahead = 0, every = 1;  // chunks that are fetched ahead, and which ones: every nth
  u32 of_four = 0;  // chunks that are always the same few, so that L2 has them
};

__global__ void __launch_bounds__(64, 1) stream(Run run, const u8* weights, u32* met) {
  extern __shared__ __align__(128) u8 ring[];
  __shared__ u64 full[slots], empty[slots];
  const u32 sm = blockIdx.x, sms = gridDim.x, lane = threadIdx.x % 32, total = run.rounds * run.chunks;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < slots; ++i) ptx::barrier_init(full + i, 1), ptx::barrier_init(empty + i, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  const auto from = [&](u32 i) {
    if (i % 4 < run.of_four) return weights + (static_cast<u64>(sm) * 8 + i / 4 % 2 * 4 + i % 4) * chunk_bytes;
    return weights + (static_cast<u64>(i / run.chunks * sms + sm) * run.chunks + i % run.chunks) * chunk_bytes;
  };
  if (threadIdx.x < 32) {
    const auto all = [](bool x) { return __all_sync(all_lanes, x); };
    u32 fetched = 0, since = ptx::clock();  // all before `fetched` are fetched, or passed over
    const auto fetch = [&](u32 next) {
      fetched = ceil_div(max_of(fetched, next), run.every) * run.every;
      if (fetched >= min_of(next + run.ahead * run.every, total)) return;
      if (run.when != always && !all(ptx::clock() - since >= 800)) return;
      if (lane == 0) ptx::prefetch_l2(from(fetched), chunk_bytes);
      ++fetched;
      since = ptx::clock();
    };
    for (u32 i = 0; i < total; ++i) {
      const u32 slot = i % slots;
      while (!all(ptx::barrier_test(empty + slot, (i / slots & 1) ^ 1)))
        if (run.when >= at_once || (run.when == landed && all(ptx::barrier_test(full + (i - 1) % slots, (i - 1) / slots & 1)))) fetch(i);
      if (i >= run.flight)
        while (!all(ptx::barrier_test(full + (i - run.flight) % slots, (i - run.flight) / slots & 1))) {}
      if (run.when == always) fetch(i + 1);
      ptx::copy_to_shared(ring + slot * chunk_bytes, from(i), chunk_bytes, full + slot, lane);
      __syncwarp();
    }
  } else if (lane == 0) {
    for (u32 i = 0; i < total; ++i) {
      if (i % run.chunks == 0) {
        ptx::red_release(met, 1);
        while (ptx::load_acquire(met) < (i / run.chunks + 1) * sms) {}
        for (const u32 began = ptx::clock(); ptx::clock() - began < run.stall_us * clocks_per_us;) {}
      }
      while (!ptx::barrier_test(full + i % slots, i / slots & 1)) {}
      ptx::barrier_arrive(empty + i % slots);
    }
  }
}

__global__ void fill(u32* words, u64 count) {
  for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < count; i += static_cast<u64>(gridDim.x) * blockDim.x)
    words[i] = (static_cast<u32>(i) * 2654435761u ^ static_cast<u32>(i) >> 15) * 2246822519u;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

int main() {
  constexpr u32 most = 24 * 178;
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  const u64 bytes = static_cast<u64>(most) * sms * chunk_bytes;
  u8* weights;
  u32* met;
  check(cudaMalloc(&weights, bytes));
  check(cudaMalloc(&met, 4));
  fill<<<1024, 256>>>(reinterpret_cast<u32*>(weights), bytes / 4);
  check(cudaFuncSetAttribute(stream, cudaFuncAttributeMaxDynamicSharedMemorySize, slots * chunk_bytes));
  cudaEvent_t began, ended;
  check(cudaEventCreate(&began));
  check(cudaEventCreate(&ended));
  const auto us = [&](const Run& run) {  // the shortest of three
    float best = 1e9f;
    for (int n = 0; n < 3; ++n) {
      float ms;
      check(cudaMemset(met, 0, 4));
      check(cudaEventRecord(began));
      stream<<<sms, 64, slots * chunk_bytes>>>(run, weights, met);
      check(cudaEventRecord(ended));
      check(cudaEventSynchronize(ended));
      check(cudaEventElapsedTime(&ms, began, ended));
      best = std::min(best, ms * 1000);
    }
    return best;
  };
  std::printf("| in flight | from L2 | TB/s in all | from memory |\n|---:|---:|---:|---:|\n");
  for (u32 flight : {4u, 5u, 6u, 8u, 10u})
    for (u32 of_four = 0; of_four <= 4; ++of_four) {
      const double all = bytes / us({1, most, 0, flight, never, 0, 1, of_four}) / 1e6;
      std::printf("| %u | %u of 4 | %.2f | %.2f |\n", flight, of_four, all, all * (4 - of_four) / 4);
    }
  struct Way {
    const char* name;
    When when;
    u32 ahead, every;
  };
  const std::vector<Way> ways = {
      {"none", never, 0, 1}, {"8 when all has landed", landed, 8, 1}, {"8, every 2nd", landed, 8, 2}, {"8, every 4th", landed, 8, 4},
      {"8 at once", at_once, 8, 1}, {"8 at once, every 3rd", at_once, 8, 3}, {"8 at once, every 4th", at_once, 8, 4},
      {"4 always", always, 4, 1}, {"8 always", always, 8, 1}, {"16 always", always, 16, 1}};
  for (u32 chunks : {60u, 178u}) {
    std::printf("\n%u chunks from meeting to meeting, %.1f MB of all SMs: us\n\n", chunks, 1e-6 * chunks * sms * chunk_bytes);
    std::printf("| fetched ahead into L2 | standing 0 us | 2 | 4 | 8 |\n|---|---:|---:|---:|---:|\n");
    for (const Way& way : ways) {
      std::printf("| %s |", way.name);
      for (u32 stall : {0u, 2u, 4u, 8u}) std::printf(" %.2f |", us({most / chunks, chunks, stall, 5, way.when, way.ahead, way.every}) / (most / chunks));
      std::printf("\n");
    }
  }
}
