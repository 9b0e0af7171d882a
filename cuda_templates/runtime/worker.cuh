// The state of one SM: its shared memory, and what each role keeps in registers.
//
// Warpgroup 0 produces: warp 0 loads and prefetches, warp 1 schedules, warp 2 watches the host and the abort flag, warp 3
// signals events for the workers, who go on meanwhile.
// Warpgroups 1 and 2 compute. Order of shared memory: ring | activations | partial sums | Shared.
#pragma once
#include "runtime/pool.cuh"
#include "runtime/ptx.cuh"

namespace mpk {

constexpr u32 producer_threads = 128;
constexpr u32 worker_warps = 8;
constexpr u32 worker_threads = worker_warps * warp_size;
constexpr u32 block_threads = producer_threads + worker_threads;
// Of each thread; 168 where they cannot be moved. A loader that claims needs more.
constexpr u32 producer_registers = MPK_POOLS ? 88 : 72, worker_registers = MPK_POOLS ? 208 : 216;
static_assert(producer_registers * producer_threads + worker_registers * worker_threads == 168 * block_threads);
constexpr u32 ready_depth = probe::hand_overs;
constexpr u32 pages_kept = 640;  // of the page table in shared memory: a load less to wait for before a page's

// What this SM is doing, for the watchdog: hand-overs from scheduler to workers, and the event that the scheduler waits for.
struct Watched {
  u32 given, taken;
  u32 step, stage, group, task, event, wanted;
};

// What of a task's values peers get, where that goes through NVSHMEM: of each token `bytes` from `first` on, `stride` apart.
struct Outgoing {
  u8* first;
  u32 bytes, stride;
};

// A token for the host: the `count`th of this launch. 0: none.
struct News {
  u32 count;
  i32 token;
};

struct Shared : probe::Recorder, PoolBoard {
  u64 full[plan::ring_slots];
  u64 empty[plan::ring_slots];
  u64 ready[ready_depth];
  u64 stored[ready_depth];  // all warps have stored what they had to
  u64 taken[ready_depth];  // by the workers, and by the warp that signals
#if MPK_NVSHMEM
  Outgoing outgoing[ready_depth];
#endif
  Step step[2];
  News news[step_slots];  // by step, from the task that samples to the warp that signals, which is a few tasks behind
  u32 stop;  // the loader may leave
  u32 described;  // steps whose descriptor is in `step`, or was
  u32 looking;  // the workers look for values, which copies would hold up: see too_many_in_flight
  u32 abort;
  u32 host_stop;
  Watched watched;
  alignas(16) float reduce[worker_warps * max_tokens];
  float rstd[max_tokens];
  i32 pages[pages_kept];  // the first entries of the page table
  alignas(16) Params params;
  alignas(16) plan::Program program;
};

constexpr u32 activation_bytes = 33792;  // a chunk of 1024 columns for 16 tokens, or 16,000 columns of one token
constexpr u32 partial_bytes = 12544;  // 8 warps x 8 tiles x 6 tokens (or 3 tiles x 16) x 8 rows x 4 bytes
constexpr u32 scratch_bytes = activation_bytes + partial_bytes;

// The plan's ring, or what the rest leaves of it.
constexpr u32 room_for_ring = plan::shared_limit - scratch_bytes - sizeof(Shared);
constexpr u32 ring_slots = min_of<u32>(plan::ring_slots, room_for_ring / plan::slot_bytes);
constexpr u32 copies_in_flight = min_of<u32>(plan::copies_in_flight, ring_slots);
constexpr u32 copies_while_looking = min_of<u32>(plan::copies_while_looking, copies_in_flight);
constexpr u32 ring_bytes = ring_slots * plan::slot_bytes;
constexpr u32 shared_bytes = ring_bytes + scratch_bytes + sizeof(Shared);
static_assert(plan::slot_bytes % 128 == 0, "ring slots are aligned to 128 bytes");
static_assert(scratch_bytes + sizeof(Shared) + 2 * plan::slot_bytes <= plan::shared_limit, "two chunks fit beside the scratch");

// The warps' sums together: neighbours first, so that three additions come after one another instead of seven.
__device__ __forceinline__ float sum_in_pairs(const float (&x)[worker_warps]) {
  static_assert(worker_warps == 8);
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Waits for a phase of an mbarrier. After an abort it returns at once.
__device__ __forceinline__ void wait_barrier(const Shared& shared, u64* bar, u32 parity) {
  ptx::barrier_wait(bar, parity, &shared.abort);
}

// The page of a block of positions.
__device__ __forceinline__ i32 page_of(const Shared& shared, u32 index) {
  return index < pages_kept ? shared.pages[index] : shared.params.pages[index];
}
// Where the part of one KV head lies: of the first layer's first page, and how far from there that of another page.
__device__ __forceinline__ u8* cache_of_head(const Shared& shared, const CachePages& of, u32 head) {
  return shared.params.cache + of.offset + head * 2 * of.half_bytes();
}
__device__ __forceinline__ u64 page_offset(const Shared& shared, const CachePages& of, u32 layer, i32 page) {
  return (static_cast<u64>(layer) * shared.params.num_pages + page) * (of.kv_heads * 2 * of.half_bytes());
}

extern __shared__ __align__(128) u8 shared_memory[];

__device__ __forceinline__ Shared& shared_state() {
  return *reinterpret_cast<Shared*>(shared_memory + ring_bytes + scratch_bytes);
}

// A task by its place in the SM's program, or behind that by its hand-over, if it was claimed.
__device__ __forceinline__ const Entry& entry_at(const Shared& shared, u32 place) {
#if MPK_POOLS
  if (place >= plan::Program::num_entries) return shared.claimed[place - plan::Program::num_entries];
#endif
  return shared.program.entry[place];
}

// Where a worker stands: all that one task hands to the next.
struct Progress {
  u32 slot = 0, slot_parity = 0;  // of the next chunk
  u32 taken = 0;  // tasks (and steps) taken from the scheduler
  u32 stage = 0, step_index = 0;
  u32 place = 0;  // of the task in its queue
};

// A slot of the ring, and the parity of the phase in which it is full.
struct LaneChunk {
  u32 slot, parity;
};

// One of the 256 threads that compute. After an abort no wait blocks, so that all of them still meet at every barrier.
struct Worker : Progress {
  Shared& shared;
  const Params& params;
  u8* ring;
  u8* scratch;
  u8* arena;  // params.arena: here it is in a register when an epilogue, behind a barrier, is to store
  u32 thread, warp, lane;
  const Step* step;
  u32 tokens, position, layer, group;
  probe::ChunkWaits waits;

  __device__ __forceinline__ Worker(const Progress& progress, u32 thread_in_block)
      : Progress(progress), shared(shared_state()), params(shared.params), ring(shared_memory),
        scratch(shared_memory + ring_bytes), arena(params.arena), thread(thread_in_block - producer_threads) {
    warp = thread / warp_size;
    lane = thread % warp_size;
    step = &shared.step[step_index % 2];
    tokens = step->tokens;
    position = step->position;
    layer = plan::stage_layer[stage];
  }

  // Layers before this one, those of earlier steps included.
  __device__ __forceinline__ u32 layers_run() const { return step_index * plan::num_layers + layer; }
  // Whether to look once more for values that are not there yet; `looks` counts how often. The flag is read seldom: what
  // lies between two looks is time that a value waits to be seen.
  __device__ __forceinline__ bool keeps_looking(u32& looks) const {
    return (++looks % 64 != 0 || !aborted()) && !probe::looks_away(params, group);
  }
  __device__ __forceinline__ bool aborted() const { return ptx::load_shared_flag(&shared.abort) != 0; }

  __device__ __forceinline__ u8* activations() const { return scratch; }
  __device__ __forceinline__ float* partials() const { return reinterpret_cast<float*>(scratch + activation_bytes); }
  __device__ __forceinline__ void sync() const {
    ptx::named_barrier(1, worker_threads);
    if (thread == 0) shared.mark_synced();
  }

  // After the barrier at which all threads had seen the task's inputs.
  __device__ __forceinline__ void mark_seen() const {
    if (thread != 0) return;
    shared.mark_seen();
    say_looking(false);
  }
  __device__ __forceinline__ void say_looking(bool looking) const {
    if constexpr (copies_while_looking < copies_in_flight) ptx::store_shared_flag(&shared.looking, looking);
  }

  // The events of the next task (or the next step's descriptor) have arrived.
  __device__ __forceinline__ void wait_ready() {
    wait_barrier(shared, &shared.ready[taken % ready_depth], taken / ready_depth % 2);
    waits = {};  // what chunks were waited for before counts as the wait for this
    if (thread == 0) {
      shared.mark_ready(taken % ready_depth);
      say_looking(true);
    }
    probe::pause(params, probe::working, taken);
  }
  // Every worker has read what the scheduler left; to be called once per wait_ready, after a barrier.
  __device__ __forceinline__ void release_ready() {
    if (thread == 0) ptx::barrier_arrive(&shared.taken[taken % ready_depth]);
    ++taken;
    if (thread == 0) ptx::store_shared_flag(&shared.watched.taken, taken);
  }

  // The next chunk's address in shared memory. All warps take all chunks: one that skipped some could be a round of the ring
  // ahead of a copy that lands late, and take the one before for it.
  __device__ __forceinline__ u32 wait_chunk() {
    if (thread == 0) shared.mark_opened();
    waits.begin();
    wait_barrier(shared, &shared.full[slot], slot_parity);
    waits.end();
    return ptx::shared_address(ring) + slot * plan::slot_bytes;
  }
  // Of the next `count` (1 or 2) chunks the one that this lane sees to: in every sixteen the first eight have the first one, the
  // others the second one where there are two.
  __device__ __forceinline__ LaneChunk chunk_of_lane(u32 count) const {
    const u32 at = slot + (count == 2 ? lane / 8 % 2 : 0);
    const bool over = at == ring_slots;
    return {over ? 0 : at, slot_parity ^ over};
  }
  __device__ __forceinline__ u32 chunk_address(LaneChunk at) const {
    return ptx::shared_address(ring) + at.slot * plan::slot_bytes;
  }
  // Whether they have landed, as this lane sees it; as all lanes of the warp do.
  __device__ __forceinline__ bool sees_landed(LaneChunk at) const {
    return ptx::barrier_test(&shared.full[at.slot], at.parity);
  }
  __device__ __forceinline__ void wait_chunks(LaneChunk at) {
    waits.begin();
    wait_barrier(shared, &shared.full[at.slot], at.parity);
    __syncwarp();
    waits.end();
  }
  __device__ __forceinline__ void free_chunks(LaneChunk at, u32 count) {
    __syncwarp();
    if (lane % 8 == 0 && lane < 8 * count) ptx::barrier_arrive(&shared.empty[at.slot]);
    const bool over = slot + count >= ring_slots;
    slot = over ? slot + count - ring_slots : slot + count;
    slot_parity ^= over;
  }
  // The chunk that wait_chunk said is there.
  __device__ __forceinline__ const u8* chunk() const { return ring + slot * plan::slot_bytes; }
  __device__ __forceinline__ void free_chunk() {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&shared.empty[slot]);
    if (thread == 0) shared.mark_used();
    if (++slot == ring_slots) {
      slot = 0;
      slot_parity ^= 1;
    }
  }

  // All stores of this task are done by this warp; the warp that signals waits for all of them.
  __device__ __forceinline__ void mark_stored() {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&shared.stored[(taken - 1) % ready_depth]);
  }

  // The end of a task, whose values are stored.
  __device__ __forceinline__ void signal(const Entry&, const Outgoing& outgoing = {}) {
    if (thread == 0) shared.mark_stored();
    probe::pause(params, probe::working, ~taken);
    sync();
    if (thread == 0) shared.hand_over((taken - 1) % ready_depth);
#if MPK_NVSHMEM
    if (thread == 0) shared.outgoing[(taken - 1) % ready_depth] = outgoing;
#endif
    mark_stored();
  }
};

// Runs one task. The Worker is made anew each time, from its place in the block up, so that the compiler does not compute the
// addresses of all tasks before the loop over them and run out of registers.
template <u32 Number, class Task>
__device__ __forceinline__ void run_task_as(Progress& progress, u32 entry) {
  Worker w(progress, ptx::thread_in_block<Number>());
  w.group = entry_at(w.shared, entry).group;
  Task::run(w, entry_at(w.shared, entry));
  progress.slot = w.slot;
  progress.slot_parity = w.slot_parity;
  progress.taken = w.taken;
}

// The same as a function of its own, for tasks of one stage of a step: they do not lie between those of every layer, and the
// compiler takes far less time for several functions than for all in one.
template <u32 Number, class Task>
__device__ __noinline__ Progress run_task_called(Progress progress, u32 entry) {
  run_task_as<Number, Task>(progress, entry);
  return progress;
}
template <u32 Number, class Task>
__device__ __forceinline__ void run_task_apart(Progress& progress, u32 entry) {
  progress = run_task_called<Number, Task>(progress, entry);
}

}  // namespace mpk
