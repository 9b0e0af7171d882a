// Greedy sampling in two stages: the highest logit of each slice, then the highest of the slices; the lowest id among equals.
//
// The second stage runs on one SM and is the authority over the token loop: it appends to the host's ring, decides whether
// to stop, and publishes the descriptor of the next step, which every SM waits for. With several ranks each of them finds the
// same id and one of them is the authority.
#pragma once
#include "tasks/inbox.cuh"

namespace mpk {

struct Best {
  float value;
  i32 id;

  __device__ __forceinline__ void consider(float other, i32 other_id) {
    if (other > value || (other == value && other_id < id)) {
      value = other;
      id = other_id;
    }
  }
  __device__ __forceinline__ void over_warp() {
#pragma unroll
    for (int d = 16; d; d /= 2) {
      const float other = __shfl_xor_sync(all_lanes, value, d);
      const i32 other_id = __shfl_xor_sync(all_lanes, id, d);
      consider(other, other_id);
    }
  }
};

constexpr i32 no_id = 0x7fffffff;

// Entry: slices [lo, hi). Pairs [tokens, slices, 2]: the value and the bits of its id. Where ranks share the vocabulary, a
// rank's ids start at `rank * RankStride`, and every rank gets the pairs of all.
template <class Logits, class Pairs, int Slice, int Valid, int RankStride = 0>
struct ArgmaxPartial {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    const u32 count = (entry.hi - entry.lo) * w.tokens;
    const int first_id = w.params.rank * RankStride;
    const int end = RankStride ? min_of(RankStride, Valid - first_id) : Valid;
    if (count == 1) {  // all warps share the slice
      float2* bests = reinterpret_cast<float2*>(w.shared.reduce);
      const Best mine = best_of(w, 0, entry.lo, end, first_id, w.thread, worker_threads);
      if (w.lane == 0) bests[w.warp] = make_float2(mine.value, __int_as_float(mine.id));
      w.sync();
      Best best{-infinity, no_id};
      if (w.thread < worker_warps) best.consider(bests[w.thread].x, __float_as_int(bests[w.thread].y));
      best.over_warp();
      if (w.thread == 0) store_pair<Pairs>(w, 0, entry.lo, make_float2(best.value, __int_as_float(best.id)));
    } else {
      for (u32 i = w.warp; i < count; i += worker_warps) {
        const int token = i % w.tokens, slice = entry.lo + i / w.tokens;
        const Best best = best_of(w, token, slice, end, first_id, w.lane, warp_size);
        if (w.lane == 0) store_pair<Pairs>(w, token, slice, make_float2(best.value, __int_as_float(best.id)));
      }
    }
    w.sync();
    w.release_ready();
    w.signal(entry, outgoing_pairs<Pairs>(w, entry.lo, entry.hi));
  }

 private:
  // Of every `step`th id of a slice from its `first` on, over the lanes of this warp.
  static __device__ __forceinline__ Best best_of(
      const Worker& w, int token, int slice, int end, int first_id, u32 first, u32 step) {
    const int lo = slice * Slice, hi = min_of(lo + Slice, end);
    Best best{-infinity, no_id};
#pragma unroll 8
    for (int id = lo + first; id < hi; id += step) best.consider(Logits::load(w, token, id), first_id + id);
    best.over_warp();
    return best;
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
      Best best{-infinity, no_id};
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
