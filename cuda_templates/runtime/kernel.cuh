// The kernel: sets shared memory up, then every warp takes its role until the token loop ends.
#pragma once
#include "runtime/loader.cuh"
#include "runtime/scheduler.cuh"
#include "runtime/signaller.cuh"

namespace mpk {

__device__ void set_up(const Params& params, Shared& shared) {
  const u32* from = reinterpret_cast<const u32*>(params.program + static_cast<u64>(blockIdx.x) * sizeof(plan::Program));
  for (u32 i = threadIdx.x; i < sizeof(plan::Program) / 4; i += block_threads)
    reinterpret_cast<u32*>(&shared.program)[i] = from[i];
  for (u32 i = threadIdx.x; i < sizeof(Params) / 4; i += block_threads)
    reinterpret_cast<u32*>(&shared.params)[i] = reinterpret_cast<const u32*>(&params)[i];
  for (u32 i = threadIdx.x; i < min_of(pages_kept, params.num_pages); i += block_threads) shared.pages[i] = params.pages[i];
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < ring_slots; ++i) {
      ptx::barrier_init(&shared.full[i], ptx::copy_arrivals);
      ptx::barrier_init(&shared.empty[i], worker_warps);
    }
    for (u32 i = 0; i < ready_depth; ++i) {
      ptx::barrier_init(&shared.ready[i], 1);
      ptx::barrier_init(&shared.stored[i], worker_warps);
      ptx::barrier_init(&shared.taken[i], 2);
    }
    ptx::fence_barrier_init();
    shared.stop = shared.abort = shared.host_stop = shared.looking = 0;
    shared.described = params.first_step;
    for (News& news : shared.news) news = {};
    shared.watched = {};
    static_cast<PoolBoard&>(shared) = {};
  }
  __syncthreads();
}

// Takes the next step's descriptor; false: stop.
__device__ __forceinline__ bool take_step(Progress& progress) {
  Worker w(progress, ptx::thread_in_block<~0u>());
  w.wait_ready();
  if (ptx::named_barrier_any(1, worker_threads, w.aborted())) return false;
  const bool more = w.step->tokens != 0;
  w.sync();
  w.release_ready();
  w.mark_stored();
  progress.taken = w.taken;
  return more;
}

#if MPK_POOLS
// Whether the scheduler gives a claimed task, not the end of the pool.
__device__ __forceinline__ bool takes_claimed(Progress& progress) {
  Worker w(progress, ptx::thread_in_block<~1u>());
  const u32 place = w.taken % ready_depth;
  wait_barrier(w.shared, &w.shared.ready[place], w.taken / ready_depth % 2);
  const bool over = w.shared.claimed[place].run == from_pool || w.aborted();
  if (!ptx::named_barrier_any(1, worker_threads, over)) return true;
  w.release_ready();
  w.mark_stored();
  progress.taken = w.taken;
  return false;
}
#endif

// Left to the compiler on Hopper, where that is how it was timed; on Blackwell a function of its own, or registers spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
__noinline__
#endif
__device__ void run_worker(const Params& params, Shared& shared) {
  Progress progress;
  for (progress.step_index = params.first_step; take_step(progress); ++progress.step_index) {
    for (progress.stage = 0; progress.stage < plan::num_stages; ++progress.stage) {
      const u32 kind = plan::stage_template[progress.stage];
      const u32 first = shared.program.queue_begin[kind], last = shared.program.queue_begin[kind + 1];
      for (u32 i = first; i < last; ++i) {
        if (beyond_stop(progress.stage, shared.program.entry[i].group)) break;
        if (threadIdx.x == producer_threads) shared.mark_asked();
        progress.place = i - first;
        u32 entry = i;
#if MPK_POOLS
        if (shared.program.entry[i].run == from_pool) {
          if (!takes_claimed(progress)) continue;
          entry = plan::Program::num_entries + progress.taken % ready_depth;
          --i;  // and once more, until there are none
        }
#endif
        run_task(progress, entry_at(shared, entry).run, entry);
      }
    }
  }
}

}  // namespace mpk

// For the host, which has its own idea of these: shared memory, threads, and the sizes of what both sides write.
extern "C" __device__ const mpk::u32 megakernel_sizes[6] = {
    mpk::shared_bytes, mpk::block_threads, sizeof(mpk::Params), sizeof(mpk::Control), sizeof(mpk::Report), sizeof(mpk::Step)};

extern "C" __global__ void __launch_bounds__(mpk::block_threads, 1) megakernel(const __grid_constant__ mpk::Params params) {
  using namespace mpk;
  Shared& shared = shared_state();
  set_up(params, shared);
  if (threadIdx.x >= producer_threads) {
    ptx::take_registers<worker_registers>();
    run_worker(params, shared);
  } else {
    ptx::give_registers<producer_registers>();
    const u32 warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    if (warp == 0) run_loader(params, shared, shared_memory, lane);
    if (warp == 1) Scheduler(params, shared, lane).run();
    if (warp == 2) run_lookout(params, shared, lane);
    if (warp == 3) Signaller(params, shared, lane).run();
  }
}
