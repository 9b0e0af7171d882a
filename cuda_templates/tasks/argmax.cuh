// Greedy sampling in two stages: the highest logit of each slice, then the highest of the slices; the lowest id among equals.
// NaN is never the highest. Slices are those of the tasks that make the logits, which find their own best as they store them,
// or of tasks of their own.
//
// The second stage runs on one SM and is the authority over the token loop: it appends to the host's ring, decides whether
// to stop, and publishes the descriptor of the next step, which every SM looks for. With several ranks each of them finds the
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
    w.mark_seen();
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
    const int row = block.first + at.tile * tile_rows + at.row;
    const OwnIds<Valid, RankStride> ids(w);
    if (row >= block.end) return;
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
          ids.template best_of<Logits>(w, token, entry.lo, entry.hi, w.lane, warp_size);
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

// What the sampled (or prompted) tokens make of the next step: the work of one warp.
//
// The SMs wait for it, so all that the sampled id does not decide is worked out by `prepare`, before it is there, and the host,
// which is far away, is told by the warp that signals.
struct TokenLoop {
  u32 tokens;  // of the next step, unless it is the end
  u32 position, emitted;
  bool samples;  // or the prompt goes on
  i32 stop_id, prompted;  // this lane's: one of the ids that end it, or none; the id of its word of the descriptor

  __device__ __forceinline__ void prepare(const Worker& w) {
    const Params& p = w.params;
    position = w.position + w.tokens;
    emitted = w.step->emitted;
    samples = position >= p.prompt_end && p.max_new > 0;
    tokens = position < p.prompt_end ? min_of(p.chunk, p.prompt_end - position) : 0;
    prompted = w.lane - first_id < tokens ? p.prompt[position + w.lane - first_id] : 0;
    stop_id = w.lane < p.num_stop_ids ? p.stop_ids[w.lane] : -1;
    if (samples) {
      ++emitted;
      tokens = position < p.context && emitted < p.max_new;
    }
    if (ptx::load_shared_flag(&w.shared.host_stop)) tokens = 0;
  }

  __device__ __forceinline__ void advance(const Worker& w, i32 sampled) const {
    if (w.params.rank != authority || __any_sync(all_lanes, w.aborted())) return;
    // no_id: every logit is NaN, and the host says so
    const bool ends = samples && (sampled == no_id || __any_sync(all_lanes, sampled == stop_id));
    const u32 id = !samples ? prompted : w.lane == first_id ? sampled : 0;
    publish(w, w.lane == 0 ? (ends ? 0 : tokens) : w.lane == 1 ? position : w.lane == 2 ? emitted : id);
    if (samples && w.lane == 0) w.shared.news[w.step_index % step_slots] = {emitted, sampled == no_id ? -1 : sampled};
  }

 private:
  static constexpr u32 first_id = step_words - max_tokens;
  static_assert(max_stop_ids <= warp_size, "a lane for each");

  // On every rank; this lane's word of the descriptor of the next step. The one in this place is of three steps before this
  // one, and every SM with tasks has read this step's, or the step would not be over.
  static __device__ __forceinline__ void publish(const Worker& w, u32 value) {
    const Params& p = w.params;
    const u32 step = w.step_index + 1;
    u64* slot = p.control->steps[step % step_slots];
    const u64 word = described(step + 1, value);
#if MPK_NVSHMEM
    if (w.lane < step_words) slot[w.lane] = word;
    __syncwarp();
    if (w.lane != 0) return;
    for (u32 peer = 0; peer < num_ranks; ++peer)
      if (peer != p.rank) shmem::put_and_signal(slot, sizeof(p.control->steps[0]), &p.control->published, peer);
    shmem::signal(&p.control->published, p.rank);
#else
    if (w.lane >= step_words) return;
    if constexpr (num_ranks > 1) {
      for (u32 peer = 0; peer < num_ranks; ++peer) ptx::show_system(p.on(peer, slot + w.lane), word);
    } else {
      ptx::show(slot + w.lane, word);
    }
#endif
  }
};

// One task on one SM: of each token's pairs, those of all ranks, one warp finds the best.
template <class Pairs, class Ids, int Slices>
struct ArgmaxReduce {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    for (u32 token = w.warp; token < w.tokens; token += worker_warps) {
      TokenLoop loop;
      const bool last = token == w.tokens - 1;
      if (last) loop.prepare(w);
      const i32 id = best_id(w, token);
      if (last) loop.advance(w, id);
      if (w.lane == 0) *reinterpret_cast<i32*>(Ids::at(w, token, 0)) = id;
    }
    w.sync();
    w.release_ready();
    w.signal(entry);
  }

 private:
  static constexpr int count = parts_of<Pairs> * Slices, per_lane = ceil_div(count, warp_size);

  // Asks for all of the lane's pairs at once; in a step of one token, where they cross as data, again for what is missing.
  static __device__ __forceinline__ i32 best_id(const Worker& w, u32 token) {
    const u8* from[per_lane];
    uint2 pair[per_lane];
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      const int slice = min_of<int>(w.lane + n * warp_size, count - 1);  // the last one may be considered twice
      from[n] = pair_at<Pairs>(w, token, slice / Slices, slice % Slices);
      Pairs::look(from[n], pair[n]);
    }
    if (w.tokens == 1)
      look_until_there<per_lane>(w, [&](int n) {
        if (!Pairs::is_missing(pair[n])) return false;
        Pairs::look(from[n], pair[n]);
        return true;
      });
    w.mark_seen();
    Best best;
#pragma unroll
    for (int n = 0; n < per_lane; ++n) best.consider(__uint_as_float(pair[n].x), static_cast<i32>(pair[n].y));
    best.over_warp();
    return best.id;
  }
};

}  // namespace mpk
