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
  static constexpr int at_once = min_of(per_thread, MPK_MOVES_REGISTERS ? 16 : 8);  // so many that registers hold them

  // Of one token all values are looked for, those of the panel put there, and true is returned.
  static __device__ __forceinline__ bool prepare(Worker& w, const Entry&, const Panel& panel) {
    if (w.tokens != 1) return false;
#pragma unroll
    for (int first = 0; first < per_thread; first += at_once) gather(w, panel, w.thread + first * worker_threads);
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
  // This thread's vectors from number `begin` on: all that is missing is asked for at once.
  static __device__ __forceinline__ void gather(const Worker& w, const Panel& panel, int begin) {
    const u8* from = Source::at(w, 0, begin * 8);
    uint4 v[at_once] = {};  // on every path, or the registers would count as in use in all other tasks too
#pragma unroll
    for (int n = 0; n < at_once; ++n)
      if (begin + n * static_cast<int>(worker_threads) < vectors) Source::look(from + n * worker_threads * 16, v[n]);
    look_until_there<at_once>(w, [&](int n) {
      if (!Source::is_missing(v[n])) return false;
      Source::look(from + n * worker_threads * 16, v[n]);
      return true;
    });
#pragma unroll
    for (int n = 0; n < at_once; ++n) {
      const int feature = (begin + n * static_cast<int>(worker_threads)) * 8;
      if (feature < panel.hi) store(w, panel, 0, feature, v[n]);
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
