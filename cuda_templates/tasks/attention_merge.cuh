// Adds up the splits of an attention, in split order, relative to their common maximum: as the prologue of a linear, or in
// tasks of their own.
//
// Partial results are float32 [tokens, splits, heads, head_dim + 2]: unnormalised sum, maximum, sum of weights. Splits that
// saw no position of a token are not read: which they are follows from the token's position.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

// Splits that saw a position of a token.
template <int Splits, int Block>
__device__ __forceinline__ int live_splits(const Worker& w, int token) {
  return min_of(Splits, static_cast<int>(w.position + token) / Block + 1);
}

// In every task of a linear.
template <class Source, int Heads, int HeadDim, int Splits, int Block>
struct AttentionMerge {
  static constexpr int row = HeadDim + 2;
  static_assert(Source::features == Splits * Heads * row, "[splits, heads, head_dim + 2]");
  static_assert(HeadDim % 4 == 0, "a thread's four features belong to one head");

  // Fills the panel too, and says so, where there is one token of few splits.
  static __device__ __forceinline__ bool prepare(Worker& w, const Entry&, const Panel& panel) {
    const bool whole = panel.hi == Heads * HeadDim;
    const int live = seen(w, 0);
    if (!whole || w.tokens > 1 || live > few) return false;
    merge_live<1>(w, panel, live);
    return true;
  }

  static __device__ void fill(const Worker& w, const Panel& panel) {
    const int count = (panel.hi - panel.lo) / 4;
    for (int i = w.thread; i < count * static_cast<int>(w.tokens); i += worker_threads) {
      Item item;
      item.open(w, i / count, panel.lo + i % count * 4);
      for (int first = 0; first < item.live; first += few) {
        item.load(first);
        item.settle(w, first);
        item.add_splits(first);
      }
      panel.store_four(w, item.token, item.feature, rounded(item.top, 1.f / item.bottom));
    }
  }

 private:
  static constexpr int few = 4;  // so many splits are loaded at once
  static constexpr u32 split_bytes = Heads * row * 4;

  static __device__ __forceinline__ int seen(const Worker& w, int token) { return live_splits<Splits, Block>(w, token); }
  // Bytes from a split's begin.
  static __device__ __forceinline__ u32 place(int feature) { return (feature / HeadDim * row + feature % HeadDim) * 4; }
  // Bytes from there to the head's statistics: maximum and sum of weights.
  static __device__ __forceinline__ u32 to_stats(int feature) { return (HeadDim - feature % HeadDim) * 4; }

  template <int Live>
  static __device__ __forceinline__ void merge_live(const Worker& w, const Panel& panel, int live) {
    if constexpr (Live < min_of(few, Splits))
      if (live > Live) return merge_live<Live + 1>(w, panel, live);
    merge_few<Live>(w, panel);
  }

  // One token, few splits: all is asked for at once, or what registers hold. While a split's statistics are missing only those are
  // looked at again: its values are dozens of times as many bytes, and looks at them, by all SMs, would keep L2 from the weights.
  template <int Live>
  static __device__ __forceinline__ void merge_few(const Worker& w, const Panel& panel) {
    constexpr int per_thread = ceil_div(Heads * HeadDim / 4, worker_threads);
    constexpr int at_once = min_of(per_thread, MPK_MOVES_REGISTERS && Live <= 2 ? 4 : 2);
    const int count = (panel.hi - panel.lo) / 4;
    const u8* row_begin = Source::at(w, 0, 0);
#pragma unroll 1
    for (int first = 0; first < count; first += at_once * worker_threads) {
      Few<Live> few_splits[at_once];
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        const int feature = panel.lo + min_of<int>(first + w.thread + n * worker_threads, count - 1) * 4;
        few_splits[n].load(row_begin + place(feature), to_stats(feature));
      }
      look_until_there<at_once>(w, [&](int n) {
        const int feature = panel.lo + min_of<int>(first + w.thread + n * worker_threads, count - 1) * 4;
        return few_splits[n].look_again(row_begin + place(feature), to_stats(feature));
      });
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        const int i = first + w.thread + n * worker_threads;
        if (i < count) panel.store_four(w, 0, panel.lo + i * 4, few_splits[n].merged());
      }
    }
  }

  // Four features of few splits.
  template <int Live>
  struct Few {
    uint2 stats[Live], low[Live], high[Live];

    __device__ __forceinline__ void load(const u8* from, u32 stats_at) {
#pragma unroll
      for (int s = 0; s < Live; ++s) {
        Source::look(from + s * split_bytes + stats_at, stats[s]);
        Source::look(from + s * split_bytes, low[s]);
        Source::look(from + s * split_bytes + 8, high[s]);
      }
    }
    // Whether something was missing.
    __device__ __forceinline__ bool look_again(const u8* from, u32 stats_at) {
      bool missing = false;
#pragma unroll
      for (int s = 0; s < Live; ++s) {
        if (Source::is_missing(stats[s])) {
          missing = true;
          Source::look(from + s * split_bytes + stats_at, stats[s]);
        } else if (Source::is_missing(low[s]) || Source::is_missing(high[s])) {
          missing = true;
          Source::look(from + s * split_bytes, low[s]);
          Source::look(from + s * split_bytes + 8, high[s]);
        }
      }
      return missing;
    }
    __device__ __forceinline__ uint2 merged() const {
      float peak = -infinity, bottom = 0.f, top[4] = {};
#pragma unroll
      for (int s = 0; s < Live; ++s) peak = fmaxf(peak, __uint_as_float(stats[s].x));
#pragma unroll
      for (int s = 0; s < Live; ++s) {
        const float factor = ptx::exp_fast(__uint_as_float(stats[s].x) - peak);
        bottom = fmaf(__uint_as_float(stats[s].y), factor, bottom);
        add(top, low[s], high[s], factor);
      }
      return rounded(top, 1.f / bottom);
    }
  };

  // Four values, until all are there. Rows are 8 bytes aligned.
  static __device__ __forceinline__ void settle_four(const Worker& w, const u8* from, uint2& low, uint2& high) {
    Source::settle(w, from, low);
    Source::settle(w, from + 8, high);
  }

  static __device__ __forceinline__ void add(float (&top)[4], uint2 low, uint2 high, float factor) {
    top[0] = fmaf(__uint_as_float(low.x), factor, top[0]);
    top[1] = fmaf(__uint_as_float(low.y), factor, top[1]);
    top[2] = fmaf(__uint_as_float(high.x), factor, top[2]);
    top[3] = fmaf(__uint_as_float(high.y), factor, top[3]);
  }
  static __device__ __forceinline__ uint2 rounded(const float (&top)[4], float factor) {
    return make_uint2(ptx::pack_bf16(top[0] * factor, top[1] * factor), ptx::pack_bf16(top[2] * factor, top[3] * factor));
  }

  // Four features of one token: the running sum over splits, relative to the highest maximum so far.
  struct Item {
    const u8* from;  // of the first split
    int token, feature, live;
    float top[4], bottom, peak;
    uint2 low[few], high[few], stats[few];

    __device__ __forceinline__ void open(const Worker& w, int at_token, int at_feature) {
      token = at_token, feature = at_feature;
      live = seen(w, token);
      from = Source::at(w, token, 0) + place(feature);
      top[0] = top[1] = top[2] = top[3] = bottom = 0.f;
      peak = -infinity;
    }
    // Asks for splits `first` and following.
    __device__ __forceinline__ void load(int first) {
#pragma unroll
      for (int s = 0; s < few; ++s) {
        low[s] = high[s] = stats[s] = make_uint2(0, 0);  // on every path, or the registers would be in use in other tasks
        if (first + s >= live) continue;
        const u8* at = from + (first + s) * split_bytes;
        Source::look(at, low[s]);
        Source::look(at + 8, high[s]);
        Source::look(at + to_stats(feature), stats[s]);
      }
    }
    __device__ __forceinline__ void settle(const Worker& w, int first) {
#pragma unroll
      for (int s = 0; s < few; ++s) {
        if (first + s >= live) continue;
        const u8* at = from + (first + s) * split_bytes;
        settle_four(w, at, low[s], high[s]);
        Source::settle(w, at + to_stats(feature), stats[s]);
      }
    }
    __device__ __forceinline__ void add_splits(int first) {
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
        add(top, low[s], high[s], factor);
        bottom = fmaf(__uint_as_float(stats[s].y), factor, bottom);
      }
    }
  };
};

// Once for all readers, which take its bf16 values as they are. Entry: heads [lo, hi). Shared memory (the scratch): one head's
// partial results. Threads load neighbouring pairs of them, each all of its own at once, so that a head takes one trip to L2
// however many splits there are.
template <class Source, class Out, int Heads, int HeadDim, int Splits, int Block>
struct MergeHeads {
  static constexpr int pairs = HeadDim / 2 + 1;  // of a row; the last one is its statistics
  static constexpr int per_thread = ceil_div(Splits * pairs, worker_threads);
  static_assert(Source::features == Splits * Heads * 2 * pairs, "[splits, heads, head_dim + 2]");
  static_assert(Out::features == Heads * HeadDim && sizeof(typename Out::type) == 2, "[heads, head_dim] bf16");
  static_assert(HeadDim % 2 == 0 && HeadDim / 2 <= worker_threads, "a thread has two features of a head");
  static_assert(Splits * pairs * sizeof(uint2) <= scratch_bytes, "a head's partial results fit into the scratch");

  static __device__ void run(Worker& w, const Entry& entry) {
    uint2* rows = reinterpret_cast<uint2*>(w.scratch);
    const int count = static_cast<int>(w.tokens) * (entry.hi - entry.lo);
    w.wait_ready();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int token = i % static_cast<int>(w.tokens), head = entry.lo + i / static_cast<int>(w.tokens);
      const int live = live_splits<Splits, Block>(w, token);
      if (i) w.sync();  // the head before has been read
      gather(w, Source::at(w, token, head * 2 * pairs), live, rows);
      w.sync();
      w.mark_seen();
      if (w.thread < HeadDim / 2)
        Out::put(w, token, head * HeadDim + 2 * static_cast<int>(w.thread), merged(rows, live, w.thread));
    }
    w.release_ready();
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ const u8* at(const u8* head, int i) {
    return head + (i / pairs * Heads * pairs + i % pairs) * static_cast<int>(sizeof(uint2));
  }

  // A head's row of each live split, one behind the other. Of what is missing a thread looks at its first pair alone until that
  // is there, then at all.
  static __device__ __forceinline__ void gather(const Worker& w, const u8* head, int live, uint2* rows) {
    const int count = live * pairs;
    uint2 v[per_thread] = {};  // on every path, or the registers would count as in use in all other tasks too
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      const int i = w.thread + n * worker_threads;
      if (i < count) Source::look(at(head, i), v[n]);
    }
    bool missing = true;
#pragma unroll 1
    for (u32 looks = 0; missing && w.keeps_looking(looks);) {
      missing = false;
      const bool all = !Source::is_missing(v[0]);
#pragma unroll
      for (int n = 0; n < per_thread; ++n) {
        if (!Source::is_missing(v[n])) continue;
        missing = true;
        if (n == 0 || all) Source::look(at(head, w.thread + n * worker_threads), v[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      const int i = w.thread + n * worker_threads;
      if (i < count) rows[i] = v[n];
    }
  }

  // Two features. The sum is that of AttentionMerge with few splits.
  static __device__ __forceinline__ u32 merged(const uint2* rows, int live, int pair) {
    float peak = -infinity, bottom = 0.f, x = 0.f, y = 0.f;
#pragma unroll 4
    for (int s = 0; s < live; ++s) peak = fmaxf(peak, __uint_as_float(rows[s * pairs + pairs - 1].x));
#pragma unroll 4
    for (int s = 0; s < live; ++s) {
      const uint2 stats = rows[s * pairs + pairs - 1], sum = rows[s * pairs + pair];
      const float factor = ptx::exp_fast(__uint_as_float(stats.x) - peak);
      bottom = fmaf(__uint_as_float(stats.y), factor, bottom);
      x = fmaf(__uint_as_float(sum.x), factor, x);
      y = fmaf(__uint_as_float(sum.y), factor, y);
    }
    return ptx::pack_bf16(x * (1.f / bottom), y * (1.f / bottom));
  }
};

}  // namespace mpk
