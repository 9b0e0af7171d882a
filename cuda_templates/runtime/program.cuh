// What the host hands to the kernel: one program per SM, made from the plan's queues, and the step descriptors.
//
// mpk_spec/emit/program.py writes these structures; the generated source asserts that both sides agree on their sizes.
#pragma once
#include "runtime/peers.cuh"
#include "runtime/probe.cuh"

#ifndef MPK_POOLS
#define MPK_POOLS 0  // claim pools of the plan, see runtime/pool.cuh
#endif

namespace mpk {

constexpr u32 num_pools = MPK_POOLS;
constexpr u16 from_pool = 0xffff;  // of Entry::run

// One task of one SM's queue. `lo`, `hi`: rows of a weight, or what the task's header says. `share`: its part of a published value.
// Or, with `from_pool` for `run`, those that the SM claims from pool `lo`; among these, one with it says that it was the last.
struct Entry {
  u16 run;  // the generated switch's case
  u16 group;
  u16 task;
  u16 num_waits;
  u16 first_wait;
  u16 num_signals;
  u16 first_signal;
  u16 spare;
  i32 lo, hi;
  i32 share_lo, share_hi;
};

// What a task takes through the ring: the rows [lo, hi) of plan::weight_rows[what]; or, for `what` beyond these, of
// plan::cache_pages the keys and values that split `hi` of KV head `lo` reads. A weight with `lo` < 0 is that of pool `hi`.
struct Load {
  u32 what;
  i32 lo, hi;
};

// `back` stages before this one, `event` must have `count` signals. In a step of one token that of `data` stages further back,
// if that one has the event: its values cross as data (tasks/tensor.cuh), and it only says that the other copy was cleared.
// One further than the first layer is the last one of the step before.
struct Wait {
  u16 event;
  u8 back, data;
  u32 count;
};

constexpr int tile_rows = 8;  // rows of a weight that one multiplication takes
// Tiles that share one pass over the activations. Their sums of 16 tokens lie in registers: half as many tiles where no
// registers can be moved to the workers.
constexpr int tiles_per_block = MPK_MOVES_REGISTERS ? 8 : 4;
constexpr int block_rows = tile_rows * tiles_per_block;

// Where a group's packed weight lies, and how its rows are cut into chunks: bytes of a row, and what of these is in a chunk at most.
struct WeightRows {
  u64 offset, layer_stride;
  u32 row_bytes, chunk_row_bytes, chunks_per_tile;
};
__device__ __forceinline__ int tiles_of(int rows) { return static_cast<u32>(rows + tile_rows - 1) / tile_rows; }

// Keys and values of one state: where they lie, and how an attention reads them: split s the blocks b of positions with
// b % splits == s, all of them once for every `rows` of its tokens x group query rows. A page is one block of one KV head,
// [K rows | V rows]; a chunk of the ring is either half, as far as it is filled. Of a row its 16 bytes number n lie in place
// key_place(position, n) or value_place(position, n), so that what is read at once, four of two neighbouring keys or one of
// eight values, is in different banks.
struct CachePages {
  u64 offset;
  u32 kv_heads, block, row_bytes, splits, group;

  static constexpr int rows = 8;  // columns of one multiplication

  __host__ __device__ constexpr u32 half_bytes() const { return block * row_bytes; }
  __host__ __device__ constexpr u32 key_place(u32 position, u32 n) const {
    return row_bytes / 16 < 8 ? n : n ^ position % 2 * 4;
  }
  __host__ __device__ constexpr u32 value_place(u32 position, u32 n) const {
    const u32 places = min_of<u32>(8, row_bytes / 16);
    return n ^ (position / (8 / places) % places);
  }
};

// Tasks of one group of a stage's template that SMs claim at run time. Their entries lie once for all SMs, behind the SMs'
// programs, from `first` on. The rows of task i lie between elements `row` + i and `row` + i + 1 of plan::pool_rows.
struct Pool {
  u32 weight, tasks, first, row;
};

template <int templates, int entries, int loads, int waits, int signals>
struct SmProgram {
  static constexpr u32 num_entries = entries;
  u16 queue_begin[templates + 1];
  u16 load_begin[templates + 1];
  Entry entry[entries];
  Load load[loads];
  Wait wait[waits];
  u16 signal[signals];
};

constexpr int max_tokens = 16;

// What one step is about. Written once, by the host (first step) or the task that samples; obeyed by every SM.
struct Step {
  u32 tokens;  // 0: stop
  u32 position;  // of the first token
  u32 emitted;  // tokens published before this step
  u32 spare;
  i32 ids[max_tokens];
};

constexpr u32 step_slots = 4, step_words = sizeof(Step) / 4;
static_assert(step_words <= warp_size, "a warp stores or looks at all words at once");

// One word of a descriptor (the low half) with the number of its step, counted from 1: stored and looked at as a whole, so that
// a word says by itself whether it has come, and neither an event nor a fence has to say so. No release goes with it. Who sees
// it knows that the step before is over, since whoever wrote it had seen that, and of other SMs' stores what its waits tell.
__device__ __forceinline__ u64 described(u32 number, u32 word) { return static_cast<u64>(number) << 32 | word; }

// Whether a word is the step's. Later ones will do: an SM that has no task may be steps behind.
__device__ __forceinline__ bool describes(u64 word, u32 number) {
  return static_cast<i32>(static_cast<u32>(word >> 32) - number) >= 0;
}

// Device memory shared by all SMs and, between launches, the host.
struct Control {
  u32 published;  // steps described so far, where descriptors come through NVSHMEM; only grows
  u32 pad0[31];
  u32 abort;
  u32 pad1[31];
  u64 steps[step_slots][step_words];
};

// What an SM was doing when the kernel was aborted.
struct Report {
  u32 set, given, taken, step, stage, group, task, event, seen, wanted;
};

// Pinned host memory. `tokens` has a slot for every position of the context, so it cannot overflow.
struct HostRing {
  u32 count;
  u32 stop;  // set by the host: end after the current step
  u32 abort;  // set by the host: another rank is lost, so nothing that the kernel waits for will come
  u32 pad[29];
  i32 tokens[1];
};

constexpr int max_stop_ids = 16;

struct Params : Peers<num_ranks> {
  const u8* weights;
  u8* arena;
  u8* cache;
  const i32* pages;  // physical page of each block of positions
  const float2* rope;
  const u8* program;
  u32* events;  // and behind them a counter for each pool
  Control* control;
  Report* reports;  // one per SM
  const i32* prompt;  // by position
  HostRing* host;
  u64 timeout_ns;
  u32 first_step;  // steps run before this launch: the running base of all events
  u32 prompt_end;  // positions below it come from `prompt`
  u32 max_new;
  u32 context;
  u32 chunk;  // prompt tokens per step
  u32 num_stop_ids;
  u32 num_pages;
  u32 spare;
  i32 stop_ids[max_stop_ids];
#if MPK_PROBED
  probe::Probes probes;
#endif
};

}  // namespace mpk
