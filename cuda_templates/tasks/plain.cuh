// Prologue of a linear whose input is a bf16 activation as it is.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <class Source>
struct Plain {
  static_assert(sizeof(typename Source::type) == 2, "the tensor cores take bf16");
  static_assert(Source::features % 8 == 0, "rows are read eight features at a time");

  static constexpr int vectors = Source::features / 8;
  static constexpr int per_thread = ceil_div(vectors, worker_threads);

  static constexpr bool fits_one_token = Panel::fits_one_token(Source::features);

  // Fills the panel too, and says so, where there is one token.
  static __device__ __forceinline__ bool prepare(Worker& w, const Entry&, bool) {
    if (w.tokens != 1) return false;
    if constexpr (!fits_one_token) {
      arrive(w);
      return false;
    }
    const u8* from = Source::at(w, 0, 0);
    uint4 v[per_thread] = {};  // on every path, or the registers would count as in use in all other tasks too
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      const int i = w.thread + n * worker_threads;
      if (i < vectors) Source::look(from + i * 16, v[n]);
    }
    look_until_there<per_thread>(w, [&](int n) {
      if (!Source::is_missing(v[n])) return false;
      Source::look(from + (w.thread + n * worker_threads) * 16, v[n]);
      return true;
    });
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      const int i = w.thread + n * worker_threads;
      if (i < vectors) store(w, Panel{0, Source::features}, 0, i * 8, v[n]);
    }
    return true;
  }

  static __device__ void fill(const Worker& w, const Panel& panel) {
    const int count = (panel.hi - panel.lo) / 8;
#pragma unroll 4
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = panel.lo + i % count * 8;
      uint4 v;
      Source::look(Source::at(w, token, feature), v);
      store(w, panel, token, feature, v);
    }
  }

 private:
  // All of one token's values are there: for all threads after the next barrier.
  static __device__ void arrive(const Worker& w) {
#pragma unroll 1
    for (int i = w.thread; i < vectors; i += worker_threads) {
      const u8* from = Source::at(w, 0, i * 8);
      uint4 v;
      Source::look(from, v);
      Source::settle(w, from, v);
    }
  }

  static __device__ __forceinline__ void store(const Worker& w, const Panel& panel, int token, int feature, uint4 v) {
    u32* to = panel.at(w, token, feature);
    to[0] = v.x;
    to[4] = v.y;
    to[8] = v.z;
    to[12] = v.w;
  }
};

}  // namespace mpk
