// The scheduler: the one warp of an SM that looks at events. It hands the workers one task after the other as they become
// ready, and the descriptor of a step before its first task.
#pragma once
#include "runtime/stop_after.cuh"
#include "runtime/worker.cuh"

namespace mpk {

struct Scheduler {
  const Params& params;
  Shared& shared;
  u32 lane;
  u32 step;  // steps since the events were zero, this one not counted
  u32 given = 0;
  u32 stage = 0;
  u32 tokens = 0;
#if MPK_POOLS
  u32 claims = 0;  // taken from the loader
#endif
  probe::Log log;

  __device__ Scheduler(const Params& p, Shared& s, u32 l) : params(p), shared(s), lane(l), step(p.first_step) {}

  __device__ __forceinline__ bool aborted() const { return ptx::load_shared_flag(&shared.abort) != 0; }

  static __device__ __forceinline__ u32 look(const u32* counter, u32 event) {
    if constexpr (num_ranks > 1)
      if (plan::from_peers(event)) return look_for_peers(counter);
    return ptx::load_acquire(counter);
  }

  // Events are never set back: after n steps a counter stands at n times the signals of one step.
  __device__ __forceinline__ void wait_event(const Wait& wait, const Entry& entry, u32 number) {
    const bool looks = tokens == 1 && !(through_nvshmem && plan::from_peers(wait.event));  // the workers do, for values
    const u32 back = wait.back + (looks ? wait.data : 0);
    const bool before = back > stage;  // it belongs to the step before
    u32 at = before ? stage + plan::num_stages - back : stage - back;
    if (looks && wait.data && stage == wait.back) at = plan::num_layers - 1;  // the write before the first layer's
    const u32 total = plan::event_total[plan::stage_template[at]][wait.event];
    const u32 count = total == 0 || (probe::starts_early(params, entry) && !wait.back) ? 0 : wait.count;
    const u32 wanted = (before ? step - 1 : step) * total + count;
    const u32 event = at * plan::num_events + wait.event;
    const u32* counter = params.events + event * plan::event_stride;
    u32 seen = total == 0 ? wanted : look(counter, wait.event);  // of what is not there nothing needs to be known
    if (static_cast<i32>(seen - wanted) < 0) say({given, 0, step, stage, entry.group, entry.task, event, wanted});
    while (static_cast<i32>(seen - wanted) < 0) {
      if (aborted()) return;
      seen = look(counter, wait.event);
    }
    if (plan::from_peers(wait.event)) arrived_from_peers(counter);
    log.put(params, probe::scheduling, number, {probe::wait, step, stage, entry.group, entry.task, event, seen, wanted});
  }

  // For the watchdog.
  __device__ __forceinline__ void say(const Watched& now) {
    Watched& to = shared.watched;
    to.step = now.step;
    to.stage = now.stage;
    to.group = now.group;
    to.task = now.task;
    to.event = now.event;
    to.wanted = now.wanted;
  }

  // Waits until the workers have taken what was given four hand-overs ago.
  __device__ __forceinline__ void wait_taken() {
    if (given < ready_depth) return;
    const u32 index = given - ready_depth;
    wait_barrier(shared, &shared.taken[index % ready_depth], index / ready_depth % 2);
  }

  __device__ __forceinline__ void give() {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&shared.ready[given % ready_depth]);
    ++given;
    if (lane == 0) ptx::store_shared_flag(&shared.watched.given, given);
  }

  static __device__ __forceinline__ u64 look_described(const u64* from) {
    u64 word;
    if constexpr (num_ranks > 1)
      ptx::look_system(from, word);
    else
      ptx::look(from, word);
    return word;
  }

  // Looks for this lane's word of the step's descriptor until all lanes have theirs, or there is an abort.
  __device__ __forceinline__ u32 wait_described() {
    const u64* from = &params.control->steps[step % step_slots][min_of(lane, step_words - 1)];
    if constexpr (through_nvshmem) {
      while (static_cast<i32>(look_for_peers(&params.control->published) - (step + 1)) < 0)
        if (aborted()) return 0;
      arrived_from_peers(&params.control->published);
    }
    u64 word = look_described(from);
    while (__any_sync(all_lanes, !describes(word, step + 1) && !aborted())) word = look_described(from);
    return static_cast<u32>(word);
  }

  // The descriptor of the next step goes to shared memory. 0: stop or abort.
  __device__ u32 next_step() {
    if (stops_early() && step != params.first_step) return end_early();
    if (lane == 0) say({given, 0, step, plan::num_stages, 0, 0, 0, step + 1});
    wait_taken();
    say_given(plan::num_stages, 0, 0);
    const u32 word = wait_described();
    if (__any_sync(all_lanes, aborted())) return 0;
    u32* to = reinterpret_cast<u32*>(&shared.step[step % 2]);
    if (lane < step_words) to[lane] = word;
    __syncwarp();
    tokens = shared.step[step % 2].tokens;
    ptx::fence_block();
    if (lane == 0) ptx::store_shared_flag(&shared.described, step + 1);
    give();
    return tokens;
  }

  // As if the step that follows said: stop.
  __device__ u32 end_early() {
    wait_taken();
    if (lane == 0) shared.step[step % 2].tokens = 0;
    give();
    return 0;
  }

  __device__ bool run_stage() {
    const u32 kind = plan::stage_template[stage];
    for (u32 i = shared.program.queue_begin[kind]; i < shared.program.queue_begin[kind + 1]; ++i) {
      const Entry& entry = shared.program.entry[i];
      if (beyond_stop(stage, entry.group)) break;
#if MPK_POOLS
      if (entry.run == from_pool) {
        if (!run_pool(entry)) return false;
        continue;
      }
#endif
      wait_taken();
      if (!run_entry(entry)) return false;
    }
    return true;
  }

  // Gives a task once its events have come; false after an abort.
  __device__ __forceinline__ bool run_entry(const Entry& entry) {
    for (u32 w = lane; w < entry.num_waits; w += warp_size)
      wait_event(shared.program.wait[entry.first_wait + w], entry, w);
    log.skip(entry.num_waits);
    probe::pause(params, probe::scheduling, given);
    if (__any_sync(all_lanes, aborted())) return false;
    say_given(stage, entry.group, entry.task);
    give();
    return true;
  }

  // Of the hand-over that comes next, for the watchdog: in a queue with pools its number does not say what it is.
  __device__ __forceinline__ void say_given(u32 of_stage, u32 group, u32 task) {
#if MPK_POOLS
    if (lane == 0) shared.given_at[given % ready_depth] = {step, of_stage, group, task};
#endif
  }

#if MPK_POOLS
  // Gives the tasks of a pool that the loader claims, and after the last one an entry that says so; false after an abort.
  __device__ bool run_pool(const Entry& pool) {
    const Pool& from = plan::pools[pool.lo];
    const u8* behind = params.program + static_cast<u64>(gridDim.x) * sizeof(plan::Program);  // the SMs' programs
    const Entry* entries = reinterpret_cast<const Entry*>(behind) + from.first;
    while (true) {
      wait_taken();
      const u32 task = next_claim(pool);
      if (__any_sync(all_lanes, aborted())) return false;
      ptx::fence_block();
      ++claims;
      if (lane == 0) ptx::store_shared_flag(&shared.claims_taken, claims);
      Entry& entry = shared.claimed[given % ready_depth];
      if (task == no_more) {
        if (lane == 0) entry.run = from_pool;
        say_given(stage, pool.group, no_more);
        give();
        return true;
      }
      const u32* words = reinterpret_cast<const u32*>(entries + task);
      if (lane < sizeof(Entry) / 4) reinterpret_cast<u32*>(&entry)[lane] = ptx::load_constant_4(words + lane);
      __syncwarp();
      if (!run_entry(entry)) return false;
    }
  }

  __device__ __forceinline__ u32 next_claim(const Entry& pool) {
    const u32* from = &shared.claim[claims % claims_kept];
    const u32 wanted = claim_word(claims, 0);
    u32 word = ptx::load_shared_flag(from);
    if (lane == 0 && (word ^ wanted) > no_more) say({given, 0, step, stage, pool.group, no_more, 0, wanted});
    while (__any_sync(all_lanes, (word ^ wanted) > no_more && !aborted())) word = ptx::load_shared_flag(from);
    return word & no_more;
  }
#endif

  __device__ void run() {
    while (next_step() != 0) {
      for (stage = 0; stage < plan::num_stages; ++stage)
        if (!run_stage()) return;
      ++step;
    }
    if (lane == 0) ptx::store_shared_flag(&shared.stop, 1);
  }
};

// Warp 2: the watchdog, and on the SM that samples the one that looks at the host's stop flag, off the critical path.
//
// Waits themselves only look at Shared::abort. Here it is noticed when nothing on this SM moves for too long; then every SM
// leaves a report, and the host blames the one that is furthest behind.
__device__ void run_lookout(const Params& params, Shared& shared, u32 lane) {
  if (lane != 0) return;
  const Watched& watched = shared.watched;
  u32 moved = 0;
  u64 since = ptx::now_ns();
  while (!ptx::load_shared_flag(&shared.stop)) {
    if (blockIdx.x == plan::sampling_sm) ptx::store_shared_flag(&shared.host_stop, ptx::load_host(&params.host->stop));
    if constexpr (num_ranks > 1)
      if (blockIdx.x == plan::sampling_sm && ptx::load_host(&params.host->abort)) ptx::claim_once(&params.control->abort);
    const u32 now_moved = ptx::load_shared_flag(&watched.given) + ptx::load_shared_flag(&watched.taken);
    const u64 now = ptx::now_ns();
    if (now_moved != moved) since = now;
    moved = now_moved;
    if (now - since > params.timeout_ns) ptx::claim_once(&params.control->abort);
    if (ptx::load_relaxed(&params.control->abort)) {
      ptx::store_shared_flag(&shared.abort, 1);
      const u64* described = params.control->steps[watched.step % step_slots];
      const u32 seen = watched.stage < plan::num_stages ? ptx::load_relaxed(params.events + watched.event * plan::event_stride)
                                                        : ptx::load_relaxed(reinterpret_cast<const u32*>(described) + 1);
      Report& report = params.reports[blockIdx.x];
      report = {1, watched.given, watched.taken, watched.step, watched.stage, watched.group,
                watched.task, watched.event, seen, watched.wanted};
#if MPK_POOLS
      if (watched.given != watched.taken) {  // the workers are at what they were given
        const Place& at = shared.given_at[watched.taken % ready_depth];
        report.step = at.step, report.stage = at.stage, report.group = at.group, report.task = at.task;
      }
#endif
      return;
    }
    ptx::sleep_ns(5000);
  }
}

}  // namespace mpk
