// The signaller: the warp that tells the events of a task once all workers have stored its values. A release waits until they
// are visible everywhere, which takes about a microsecond; the workers need not. For the same reason it tells the host.
#pragma once
#include "runtime/stop_after.cuh"
#include "runtime/worker.cuh"

namespace mpk {

struct Signaller {
  const Params& params;
  Shared& shared;
  u32 lane;
  u32 step;
  u32 stage = 0;
  u32 handled = 0;  // tasks, and steps
  probe::Log log;

  __device__ Signaller(const Params& p, Shared& s, u32 l) : params(p), shared(s), lane(l), step(p.first_step) {}

  // Waits until the workers are done with what the scheduler gave them next; false after an abort.
  __device__ __forceinline__ bool wait_stored() {
    wait_barrier(shared, &shared.stored[handled % ready_depth], handled / ready_depth % 2);
    return !__any_sync(all_lanes, ptx::load_shared_flag(&shared.abort) != 0);
  }
  __device__ __forceinline__ void done() {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&shared.taken[handled % ready_depth]);
    ++handled;
  }

  // A signal to this rank or, where the event is all ranks', to a peer. Such an event has all its signals at system scope, so
  // that they add up.
  __device__ __forceinline__ void send(const Entry& entry, u32 peer, u32 index) {
    const u32 name = shared.program.signal[entry.first_signal + index];
    const bool shared_by_ranks = plan::from_peers(name);
    if (!shared_by_ranks && peer != 0) return;
    const u32 event = stage * plan::num_events + name;
    u32* counter = params.events + event * plan::event_stride;
    const u32 found = signal_rank(counter, peer, shared_by_ranks);
    if (!shared_by_ranks || peer == params.rank)
      log.put(params, probe::working, 1 + index, {probe::signal, step, stage, entry.group, entry.task, event, found});
  }

  // In a build that records, returns what the counter was.
  __device__ __forceinline__ u32 signal_rank(u32* counter, u32 rank, bool shared_by_ranks) const {
#if MPK_NVSHMEM
    static_assert(!MPK_CONFORM, "NVSHMEM's signals do not say what they find");
    if (shared_by_ranks) {
      shmem::signal(counter, rank);
      return 0;
    }
#endif
    return probe::send(shared_by_ranks ? params.on(rank, counter) : counter, shared_by_ranks);
  }

#if MPK_NVSHMEM
  // All signals of a task to one rank, the first that peers wait for together with what they wait for.
  __device__ __forceinline__ void post(const Entry& entry, u32 rank) {
    Outgoing part = shared.outgoing[handled % ready_depth];
    if (rank == params.rank) part.bytes = 0;
    for (u32 index = 0; index < entry.num_signals; ++index) {
      const u32 name = shared.program.signal[entry.first_signal + index];
      if (part.bytes == 0 || !plan::from_peers(name)) {
        send(entry, rank, index);
        continue;
      }
      const u32 last = shared.step[step % 2].tokens - 1;
      for (u32 token = 0; token < last; ++token) shmem::put(part.first + token * part.stride, part.bytes, rank);
      if (last) shmem::order();
      u32* counter = params.events + (stage * plan::num_events + name) * plan::event_stride;
      shmem::put_and_signal(part.first + last * part.stride, part.bytes, counter, rank);
      part.bytes = 0;
    }
  }
#endif

  __device__ __forceinline__ void signal(const Entry& entry, u32 place) {
    probe::pause(params, probe::signalling, handled);
    const bool silent = probe::drops_signals(params, stage, entry);
#if MPK_NVSHMEM
    if (lane < num_ranks && !silent) post(entry, lane);
#else
    if (lane < entry.num_signals * num_ranks && !silent) send(entry, lane % num_ranks, lane / num_ranks);
#endif
    if (lane == 0) {
      log.put_start(params, shared.started(handled % ready_depth), {probe::start, step, stage, entry.group, entry.task});
      shared.write_times(handled % ready_depth, params, step, stage, place, plan::num_stages, plan::max_queue);
    }
    log.skip(1 + entry.num_signals);
  }

  __device__ bool run_stage() {
    const u32 kind = plan::stage_template[stage];
    const u32 first = shared.program.queue_begin[kind], last = shared.program.queue_begin[kind + 1];
    for (u32 i = first; i < last; ++i) {
      const Entry& entry = shared.program.entry[i];
      if (beyond_stop(stage, entry.group)) break;
#if MPK_POOLS
      if (entry.run == from_pool) {
        if (!signal_claimed()) return false;
        continue;
      }
#endif
      if (!wait_stored()) return false;
      signal(entry, i - first);
      done();
    }
    return true;
  }

#if MPK_POOLS
  // Of a pool's tasks those that this SM has claimed.
  __device__ bool signal_claimed() {
    for (bool more = true; more;) {
      if (!wait_stored()) return false;
      const Entry& entry = shared.claimed[handled % ready_depth];
      more = entry.run != from_pool;
      if (more) signal(entry, 0);
      done();
    }
    return true;
  }
#endif

  __device__ void run() {
    run_steps();
#if MPK_NVSHMEM
    if (lane == 0) shmem::complete();  // once the kernels have ended, the ranks may set their events back
#endif
  }

 private:
  __device__ void run_steps() {
    for (;; ++step) {
      if (!wait_stored()) return;
      const bool more = shared.step[step % 2].tokens != 0;
      done();
      if (!more) return;
      for (stage = 0; stage < plan::num_stages; ++stage)
        if (!run_stage()) return;
      if (lane == 0 && blockIdx.x == plan::sampling_sm) tell_host();
    }
  }

  // The step's token. The workers write this place again four steps on, when this warp has signalled all tasks before.
  __device__ __forceinline__ void tell_host() const {
    News& news = shared.news[step % step_slots];
    if (news.count == 0) return;
    params.host->tokens[news.count - 1] = news.token;
    ptx::store_host_release(&params.host->count, news.count);
    news.count = 0;
  }
};

}  // namespace mpk
