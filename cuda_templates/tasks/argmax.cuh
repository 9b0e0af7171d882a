// Greedy sampling in two stages: the highest logit of each slice, then the highest of the slices; the lowest id among equals.
// NaN is never the highest. Slices are those of the tasks that make the logits, which find their own best as they store them,
// or of tasks of their own.
//
// The second stage runs on one SM and is the authority over the token loop: it appends to the host's ring, decides whether
// to stop, and publishes the descriptor of the next step, which every SM waits for. With several ranks each of them finds the
// same id and one of them is the authority.
#pragma once
#include "tasks/inbox.cuh"

namespace mpk {

constexpr i32 no_id = 0x7fffffff;

struct Best {
  float value = -infinity;
  i32 id = no_id;

  __device__ __forceinline__ void consider(float other, i32 other_id) {
    if (other > value || (other == value && other_id < id)) {
      value = other;
      id = other_id;
    }
  }
  __device__ __forceinline__ void over_warp() {
    const u32 mine = rank(value), top = __reduce_max_sync(all_lanes, mine);
    id = __reduce_min_sync(all_lanes, mine == top ? id : no_id);
    value = __uint_as_float(top & 0x80000000u ? top & 0x7fffffffu : ~top);
  }
  __device__ __forceinline__ float2 pair() const { return make_float2(value, __int_as_float(id)); }

 private:
  // Ordered as the values are, whose zeros are equal.
  static __device__ __forceinline__ u32 rank(float x) {
    const u32 bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
};

// The ids of the logits that this rank has: from `first` on, up to `end` of them. Where ranks share the vocabulary, a rank's
// start at `rank * RankStride`; from `Valid` on they are padding.
template <int Valid, int RankStride>
struct OwnIds {
  int first, end;

  __device__ __forceinline__ OwnIds(const Worker& w)
      : first(w.params.rank * RankStride), end(RankStride ? min_of(RankStride, Valid - first) : Valid) {}

  // The best of every `step`th logit of [lo, hi) from the `from`th on, over the lanes of this warp.
  template <class Logits>
  __device__ __forceinline__ Best best_of(const Worker& w, int token, int lo, int hi, u32 from, u32 step) const {
    const int last = min_of(hi, end);
    Best best;
#pragma unroll 8
    for (int id = lo + from; id < last; id += step) best.consider(Logits::load(w, token, id), first + id);
    best.over_warp();
    return best;
  }
};

// Entry: slices [lo, hi). Pairs [tokens, slices, 2]: the value and the bits of its id. Where ranks share the vocabulary, every
// rank gets the pairs of all.
template <class Logits, class Pairs, int Slice, int Valid, int RankStride = 0>
struct ArgmaxPartial {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    const u32 count = (entry.hi - entry.lo) * w.tokens;
    const OwnIds<Valid, RankStride> ids(w);
    if (count == 1) {  // all warps share the slice
      float2* bests = reinterpret_cast<float2*>(w.shared.reduce);
      const Best mine = ids.template best_of<Logits>(w, 0, entry.lo * Slice, entry.hi * Slice, w.thread, worker_threads);
      if (w.lane == 0) bests[w.warp] = mine.pair();
      w.sync();
      Best best;
      if (w.thread < worker_warps) best.consider(bests[w.thread].x, __float_as_int(bests[w.thread].y));
      best.over_warp();
      if (w.thread == 0) store_pair<Pairs>(w, 0, entry.lo, best.pair());
    } else {
      for (u32 i = w.warp; i < count; i += worker_warps) {
        const int token = i % w.tokens, slice = entry.lo + i / w.tokens;
        const Best best = ids.template best_of<Logits>(w, token, slice * Slice, (slice + 1) * Slice, w.lane, warp_size);
        if (w.lane == 0) store_pair<Pairs>(w, token, slice, best.pair());
      }
    }
    w.sync();
    w.release_ready();
    w.signal(entry, outgoing_pairs<Pairs>(w, entry.lo, entry.hi));
  }
};

// Epilogue: stores the logits, and of each task the best of its own: pair `i` is that of task `i`.
template <class Logits, int Rows, class Bias, class Pairs, int Valid, int RankStride>
struct StoreBest : Store<1, Part<Logits, Rows, Bias>> {
  // In a step of one token each thread remembers the best that it has stored.
  static __device__ __forceinline__ void finish_one(const Worker& w, const Block& block, Best& kept) {
    if (w.thread >= block.tiles * tile_rows) return;
    const auto at = Block::place<tile_rows>(w.thread, 1);
    const int row = (block.first + at.tile) * tile_rows + at.row;
    const OwnIds<Valid, RankStride> ids(w);
    if (row >= Rows) return;
    const float value = block.sum(w, at.tile, at.row, 0) + Bias::load(w, row);
    Logits::store(w, 0, row, value);
    if (row < ids.end) kept.consider(as_stored<typename Logits::type>(value), ids.first + row);
  }

  // No prologue needs Shared::reduce any more.
  static __device__ __forceinline__ void end_one(const Worker& w, const Entry& entry, Best best) {
    constexpr u32 holders = ceil_div(block_rows, warp_size);  // warps that have stored something
    float2* bests = reinterpret_cast<float2*>(w.shared.reduce);
    best.over_warp();
    if (w.lane == 0 && w.warp < holders) bests[w.warp] = best.pair();
    w.sync();
    if (w.thread != 0) return;
#pragma unroll
    for (u32 i = 1; i < holders; ++i) best.consider(bests[i].x, __float_as_int(bests[i].y));
    store_pair<Pairs>(w, 0, entry.task, best.pair());
  }

  // In a step of several tokens the task looks at its logits again.
  static __device__ __forceinline__ void end_many(const Worker& w, const Entry& entry) {
    const OwnIds<Valid, RankStride> ids(w);
    w.sync();
    for (u32 token = w.warp; token < w.tokens; token += worker_warps) {
      const Best best =
          ids.template best_of<Logits>(w, token, entry.lo * tile_rows, entry.hi * tile_rows, w.lane, warp_size);
      if (w.lane == 0) store_pair<Pairs>(w, token, entry.task, best.pair());
    }
  }
};

template <class Logits, int Rows, class Bias, class Pairs, int Valid, int RankStride>
struct Ending<StoreBest<Logits, Rows, Bias, Pairs, Valid, RankStride>> {
  using Epilogue = StoreBest<Logits, Rows, Bias, Pairs, Valid, RankStride>;
  using Kept = Best;
  static __device__ __forceinline__ void finish(
      const Worker& w, const Block& block, const typename Epilogue::Early&, Best& kept) {
    Epilogue::finish_one(w, block, kept);
  }
  static __device__ __forceinline__ void one(const Worker& w, const Entry& entry, const Best& kept) {
    Epilogue::end_one(w, entry, kept);
  }
  static __device__ __forceinline__ void many(const Worker& w, const Entry& entry) { Epilogue::end_many(w, entry); }
};

template <class Logits, int Rows, class Bias, class Pairs, int Valid, int RankStride>
struct ForPeers<StoreBest<Logits, Rows, Bias, Pairs, Valid, RankStride>> {
  static __device__ __forceinline__ Outgoing of(const Worker& w, const Entry& entry) {
    return outgoing_pairs<Pairs>(w, entry.task, entry.task + 1);
  }
};

// What the sampled (or prompted) tokens make of the next step.
struct TokenLoop {
  static __device__ bool is_stop(const Params& p, i32 id) {
    for (u32 i = 0; i < p.num_stop_ids; ++i)
      if (p.stop_ids[i] == id) return true;
    return false;
  }

  static __device__ void advance(const Worker& w, i32 sampled, u32 step_index) {
    const Params& p = w.params;
    if (p.rank != authority) return;
    Step next{};
    next.position = w.position + w.tokens;
    const u32 emitted = next.emitted = w.step->emitted;
    const bool stopped = ptx::load_shared_flag(&w.shared.host_stop) != 0;
    if (next.position < p.prompt_end) {
      next.tokens = stopped ? 0 : min_of(p.chunk, p.prompt_end - next.position);
      for (u32 i = 0; i < next.tokens; ++i) next.ids[i] = p.prompt[next.position + i];
    } else if (p.max_new > 0) {
      const bool none = sampled == no_id;  // every logit is NaN: the host says so
      ++next.emitted;
      const bool full = next.position >= p.context || next.emitted >= p.max_new;
      next.tokens = stopped || none || full || is_stop(p, sampled) ? 0 : 1;
      next.ids[0] = sampled;
    }
    if (w.aborted()) return;
    publish(p, p.control->steps[(step_index + 1) % step_slots], next);
    // The host last: it is far away, and the SMs wait for the step.
    if (next.emitted != emitted) p.host->tokens[emitted] = sampled == no_id ? -1 : sampled;
    ptx::store_host_release(&p.host->count, next.emitted);
  }

  // On every rank.
  static __device__ __forceinline__ void publish(const Params& p, Step& slot, const Step& next) {
#if MPK_NVSHMEM
    slot = next;
    for (u32 peer = 0; peer < num_ranks; ++peer)
      if (peer != p.rank) shmem::put_and_signal(&slot, sizeof(Step), &p.control->published, peer);
    shmem::signal(&p.control->published, p.rank);
#else
    if constexpr (num_ranks > 1) {
      for (u32 peer = 0; peer < num_ranks; ++peer) *p.on(peer, &slot) = next;
      ptx::fence_system();
      for (u32 peer = 0; peer < num_ranks; ++peer) ptx::red_system(p.on(peer, &p.control->published), 1);
    } else {
      slot = next;
      ptx::red_release(&p.control->published, 1);
    }
#endif
  }
};

// One task on one SM.
template <class Pairs, class Ids, int Slices>
struct ArgmaxReduce {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    for (u32 token = w.warp; token < w.tokens; token += worker_warps) {
      Best best;
#pragma unroll 8
      for (int slice = w.lane; slice < parts_of<Pairs> * Slices; slice += warp_size) {
        const uint2 pair = ptx::load_l2_8(pair_at<Pairs>(w, token, slice / Slices, slice % Slices));
        best.consider(__uint_as_float(pair.x), static_cast<i32>(pair.y));
      }
      best.over_warp();
      if (w.lane == 0) *reinterpret_cast<i32*>(Ids::at(w, token, 0)) = best.id;
      if (w.lane == 0 && token == w.tokens - 1) TokenLoop::advance(w, best.id, w.step_index);
    }
    w.sync();
    w.release_ready();
    w.signal(entry);
  }
};

}  // namespace mpk
