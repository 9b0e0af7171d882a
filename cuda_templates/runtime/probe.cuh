// What builds for profiling and testing add to the runtime. Each macro is off by default, and then nothing of it is compiled:
//   MPK_PROFILE  when each task asked, was ready, had seen its inputs, had its data, was done (TaskTimes), and when the loader
//                asked memory for what (CopyTime)
//   MPK_CONFORM  which counter values the waits saw and which the signals found (LogEntry), in the order it happened
//   MPK_DELAYS   random pauses in scheduler, workers and loader, from a seed
//   MPK_DEFECTS  mistakes chosen at launch, which comparison, conformance or watchdog must find
//
// mpk_spec/runtime/cuda_probe.py mirrors the structures and the names of the defects.
#pragma once
#include "runtime/ptx.cuh"

#ifndef MPK_PROFILE
#define MPK_PROFILE 0
#endif
#ifndef MPK_CONFORM
#define MPK_CONFORM 0
#endif
#ifndef MPK_DELAYS
#define MPK_DELAYS 0
#endif
#ifndef MPK_DEFECTS
#define MPK_DEFECTS 0
#endif
#define MPK_PROBED (MPK_PROFILE || MPK_CONFORM || MPK_DELAYS || MPK_DEFECTS)

namespace mpk::probe {

// One task as its first worker saw it, in cycles of the SM's clock. `global_ns` was read together with `asked`.
struct TaskTimes {
  u64 global_ns;
  u64 asked;  // the task before it is over
  u64 ready;  // its events have come
  u64 seen;  // its inputs have all been seen and prepared; 0: when it was ready
  u64 opened;  // asks for its first chunk, of the cache perhaps before it is ready; 0: needs none
  u64 waited;  // how long the warp that waited most waited for chunks, once it was ready
  u64 computed;  // its last chunk is used up; 0: it had none
  u64 stored;  // its results are stored
  u64 signalled;  // its signals are sent
};

// One copy of the loader.
struct CopyTime {
  u32 clock;  // the lower half of the SM's
  u32 bytes;  // 0: there is none
};

enum Kind : u32 { none, wait, start, signal };  // of a LogEntry; `none`: the log ends here

struct LogEntry {
  u32 kind, step, stage, group, task, event;
  u32 value;  // what a wait saw, or what the counter was before the signal
  u32 wanted;  // of a wait
  u32 clock;
};

enum Role : u32 { scheduling, working, loading, signalling };
constexpr u32 num_logs = 2;  // of an SM: the scheduler's waits, the workers' starts and signals

enum Defect : u32 { no_defect, dropped_signal, early_event, wrong_page, lost_residual, late_position, missing_gain, wrong_eps };

// The last part of Params in such builds.
struct Probes {
  TaskTimes* times;  // [trace_steps][SM][stage][max_queue]
  LogEntry* log;  // [SM][num_logs][log_capacity]
  CopyTime* copies;  // [SM][copy_capacity], a copy at its number from the launch's first, as often as that fits in
  u64 copy_capacity;  // a power of two, no less than what is recorded
  u32 trace_step, trace_steps;  // steps that are recorded
  u32 log_capacity;
  u32 delay_seed;  // 0: no delays
  u32 defect, at_stage, at_group, at_task;  // dropped_signal: of this task; early_event: of this group, in all stages
};

// Whether a defect was asked for. Params is a template parameter since it holds Probes.
template <class Params>
__device__ __forceinline__ bool planted(const Params& params, Defect defect) {
#if MPK_DEFECTS
  return params.probes.defect == defect;
#else
  return false;
#endif
}

template <class Params, class Entry>
__device__ __forceinline__ bool drops_signals(const Params& params, u32 stage, const Entry& entry) {
#if MPK_DEFECTS
  const Probes& p = params.probes;
  return p.defect == dropped_signal && p.at_stage == stage && p.at_group == entry.group && p.at_task == entry.task;
#else
  return false;
#endif
}

template <class Params, class Entry>
__device__ __forceinline__ bool starts_early(const Params& params, const Entry& entry) {
#if MPK_DEFECTS
  return params.probes.defect == early_event && params.probes.at_group == entry.group;
#else
  return false;
#endif
}

// Whether a group does not wait for values that cross as data.
template <class Params>
__device__ __forceinline__ bool looks_away(const Params& params, u32 group) {
#if MPK_DEFECTS
  return params.probes.defect == early_event && params.probes.at_group == group;
#else
  return false;
#endif
}

// A pause of up to 16 us, in one of four cases, that depends on the seed, the SM, the warp and the place.
template <class Params>
__device__ __forceinline__ void pause(const Params& params, Role role, u32 place) {
#if MPK_DELAYS
  if (params.probes.delay_seed == 0) return;
  u32 hash = params.probes.delay_seed * 0x9e3779b9u + role * 0x85ebca6bu + blockIdx.x * 0xc2b2ae35u + place * 0x27d4eb2fu;
  hash += threadIdx.x / warp_size * 0x165667b1u;
  hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
  hash = (hash ^ hash >> 12) * 0x297a2d39u;
  hash ^= hash >> 15;
  if (hash % 4 == 0) ptx::sleep_ns(hash / 4 % 8192);  // the hardware sleeps up to twice as long
#endif
}

// How long one warp has waited for its task's chunks.
struct ChunkWaits {
#if MPK_PROFILE
  u64 since, total = 0;
#endif

  __device__ __forceinline__ void begin() {
#if MPK_PROFILE
    since = ptx::cycles();
#endif
  }
  __device__ __forceinline__ void end() {
#if MPK_PROFILE
    total += ptx::cycles() - since;
#endif
  }
};

// Puts down copy `number` of the launch of one SM's loader, for a step.
template <class Params>
__device__ __forceinline__ void note_copy(const Params& params, u32 step, u32 number, u32 bytes) {
#if MPK_PROFILE
  const Probes& p = params.probes;
  const u32 at = step - p.trace_step;  // wraps: later than any step before it
  if (at < p.trace_steps)
    p.copies[blockIdx.x * p.copy_capacity + (number & p.copy_capacity - 1)] = {static_cast<u32>(ptx::cycles()), bytes};
#endif
}

constexpr u32 hand_overs = 4;  // tasks that may be under way between scheduler, workers and the warp that signals

// The times of the SM's current task; a base of Shared, so that it takes no room where it is empty. One thread calls all of
// it but `mark_waited` and, of the warp that signals, `write_times`.
struct Recorder {
#if MPK_PROFILE
  TaskTimes times;
  TaskTimes done[hand_overs];  // of the last tasks, until the warp that signals has written them
  u32 using_chunks;  // since the last barrier
#endif
#if MPK_CONFORM
  u32 start[hand_overs];  // clock when the workers' last tasks were ready
#endif

  __device__ __forceinline__ void mark_asked() {
#if MPK_PROFILE
    times = {ptx::now_ns(), ptx::cycles()};
    using_chunks = 0;
#endif
  }
  // `place`: of the hand-over.
  __device__ __forceinline__ void mark_ready(u32 place) {
#if MPK_PROFILE
    times.ready = ptx::cycles();
#endif
#if MPK_CONFORM
    start[place] = static_cast<u32>(ptx::cycles());
#endif
  }
  __device__ __forceinline__ u32 started(u32 place) const {
#if MPK_CONFORM
    return start[place];
#else
    return 0;
#endif
  }
  __device__ __forceinline__ void mark_seen() {
#if MPK_PROFILE
    if (times.seen == 0) times.seen = ptx::cycles();
#endif
  }
  __device__ __forceinline__ void mark_opened() {
#if MPK_PROFILE
    if (times.opened == 0) times.opened = ptx::cycles();
#endif
  }
  __device__ __forceinline__ void mark_used() {
#if MPK_PROFILE
    using_chunks = 1;
#endif
  }
  // Of all warps the longest wait counts.
  __device__ __forceinline__ void mark_waited(const ChunkWaits& waits) {
#if MPK_PROFILE
    ptx::max_shared(&times.waited, waits.total);
#endif
  }
  // At the barrier after chunks were used, all warps are done with theirs.
  __device__ __forceinline__ void mark_synced() {
#if MPK_PROFILE
    if (using_chunks) times.computed = ptx::cycles();
    using_chunks = 0;
#endif
  }
  __device__ __forceinline__ void mark_stored() {
#if MPK_PROFILE
    times.stored = ptx::cycles();
#endif
  }
  // The place of a task's times: `place` in its SM's queue of the stage. None where the step is not recorded.
  template <class Params>
  __device__ __forceinline__ TaskTimes* times_at(const Params& params, u32 step, u32 stage, u32 place, u32 num_stages, u32 places) {
#if MPK_PROFILE
    const Probes& p = params.probes;
    const u32 at = step - p.trace_step;  // wraps: later than any step before it
    if (at < p.trace_steps) return &p.times[((static_cast<u64>(at) * gridDim.x + blockIdx.x) * num_stages + stage) * places + place];
#endif
    return nullptr;
  }
  // The task's times, for the warp that signals: to write them takes half a microsecond, in which the next task could run.
  // `place`: of the hand-over.
  __device__ __forceinline__ void hand_over(u32 place) {
#if MPK_PROFILE
    done[place] = times;
#endif
  }
  // Once it has signalled; `place`: of the hand-over.
  template <class... Place>
  __device__ __forceinline__ void write_times(u32 place, Place... of_task) {
#if MPK_PROFILE
    if (TaskTimes* to = times_at(of_task...)) {
      *to = done[place];
      to->signalled = ptx::cycles();
    }
#endif
  }
};

// One role's place in its log.
struct Log {
#if MPK_CONFORM
  u32 count = 0;
#endif

  // Puts down entry `ahead` of those that `skip` then passes.
  template <class Params>
  __device__ __forceinline__ void put(const Params& params, Role role, u32 ahead, const LogEntry& entry) const {
#if MPK_CONFORM
    LogEntry now = entry;
    now.clock = static_cast<u32>(ptx::cycles());
    write(params, role, ahead, now);
#endif
  }
  template <class Params>
  __device__ __forceinline__ void put_start(const Params& params, u32 clock, const LogEntry& entry) const {
#if MPK_CONFORM
    LogEntry then = entry;
    then.clock = clock;
    write(params, working, 0, then);
#endif
  }
  __device__ __forceinline__ void skip(u32 entries) {
#if MPK_CONFORM
    count += entries;
#endif
  }

 private:
  template <class Params>
  __device__ __forceinline__ void write(const Params& params, Role role, u32 ahead, const LogEntry& entry) const {
#if MPK_CONFORM
    const Probes& p = params.probes;
    const u64 at = static_cast<u64>(blockIdx.x * num_logs + role) * p.log_capacity;
    if (count + ahead < p.log_capacity) p.log[at + count + ahead] = entry;
#endif
  }
};

// Signals an event, one of several GPUs' at system scope; in a build that records, returns what its counter was.
__device__ __forceinline__ u32 send(u32* counter, bool system) {
#if MPK_CONFORM
  return system ? ptx::add_release_system(counter, 1) : ptx::add_release(counter, 1);
#else
  if (system)
    ptx::red_release_system(counter, 1);
  else
    ptx::red_release(counter, 1);
  return 0;
#endif
}

}  // namespace mpk::probe
