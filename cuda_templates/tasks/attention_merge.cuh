// Prologue of a linear: adds up the splits of an attention, in split order, relative to their common maximum.
//
// Partial results are float32 [tokens, splits, heads, head_dim + 2]: unnormalised sum, maximum, sum of weights. Splits that
// saw no position of a token are not read: which they are follows from the token's position.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <u64 Offset, int Heads, int HeadDim, int Splits, int Block>
struct AttentionMerge {
  static constexpr int row = HeadDim + 2;
  static_assert(HeadDim % 4 == 0, "a thread's four features belong to one head");

  static __device__ __forceinline__ bool prepare(Worker&, const Entry&, bool) { return false; }

  static __device__ void fill(const Worker& w, const Panel& panel) {
    const int count = (panel.hi - panel.lo) / 4;
    const int total = count * w.tokens;
    for (int i = w.thread; i < total; i += worker_threads * at_once) {
      Item items[at_once];
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        const int it = i + n * worker_threads;
        const int token = w.tokens == 1 ? 0 : it / count;
        items[n].open(w, token, panel.lo + (it - token * count) * 4, it < total);
      }
      for (int first = 0;; first += few) {  // so many splits are loaded at once
        bool more = false;
#pragma unroll
        for (int n = 0; n < at_once; ++n) more |= items[n].load(first);
#pragma unroll
        for (int n = 0; n < at_once; ++n) items[n].add(first);
        if (!more) break;
      }
#pragma unroll
      for (int n = 0; n < at_once; ++n)
        if (items[n].live) panel.store_four(w, items[n].token, items[n].feature, items[n].rounded());
    }
  }

 private:
  static constexpr int few = 4, at_once = 2;
  static constexpr u32 split_bytes = Heads * row * 4;

  // Four features of one token: the running sum over splits, relative to the highest maximum so far.
  struct Item {
    const u8* from;  // of the first split
    int token, feature, live;
    float top[4], bottom, peak;
    uint2 low[few], high[few], stats[few];

    __device__ __forceinline__ void open(const Worker& w, int at_token, int at_feature, bool exists) {
      token = at_token, feature = at_feature;
      live = exists ? min_of(Splits, static_cast<int>(w.position + token) / Block + 1) : 0;
      const int head = feature / HeadDim, dim = feature % HeadDim;
      from = w.params.arena + Offset + static_cast<u64>(token * Splits * Heads + head) * (row * 4) + dim * 4;
      top[0] = top[1] = top[2] = top[3] = bottom = 0.f;
      peak = -infinity;
    }
    // Asks for splits `first` and following; whether there are more after them.
    __device__ __forceinline__ bool load(int first) {
#pragma unroll
      for (int s = 0; s < few; ++s) {
        low[s] = high[s] = stats[s] = make_uint2(0, 0);  // on every path, or the registers would be in use in other tasks
        if (first + s >= live) continue;
        const u8* at = from + (first + s) * split_bytes;
        low[s] = ptx::load_l2_8(at);
        high[s] = ptx::load_l2_8(at + 8);
        stats[s] = ptx::load_l2_8(at + (HeadDim - feature % HeadDim) * 4);
      }
      return first + few < live;
    }
    __device__ __forceinline__ void add(int first) {
      float highest = peak;
#pragma unroll
      for (int s = 0; s < few; ++s)
        if (first + s < live) highest = fmaxf(highest, __uint_as_float(stats[s].x));
      if (first) {
        const float factor = ptx::exp_fast(peak - highest);
        bottom *= factor;
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i] *= factor;
      }
      peak = highest;
#pragma unroll
      for (int s = 0; s < few; ++s) {
        if (first + s >= live) continue;
        const float factor = ptx::exp_fast(__uint_as_float(stats[s].x) - highest);
        top[0] = fmaf(__uint_as_float(low[s].x), factor, top[0]);
        top[1] = fmaf(__uint_as_float(low[s].y), factor, top[1]);
        top[2] = fmaf(__uint_as_float(high[s].x), factor, top[2]);
        top[3] = fmaf(__uint_as_float(high[s].y), factor, top[3]);
        bottom = fmaf(__uint_as_float(stats[s].y), factor, bottom);
      }
    }
    __device__ __forceinline__ uint2 rounded() const {
      return make_uint2(ptx::pack_bf16(top[0] / bottom, top[1] / bottom), ptx::pack_bf16(top[2] / bottom, top[3] / bottom));
    }
  };
};

}  // namespace mpk
