// The sum over ranks on its own, with the residual that is added to it: where no linear adds up the parts as it loads them.
//
// Entry: features [lo, hi) of all tokens. No shared memory; one element per thread at a time.
#pragma once
#include "tasks/inbox.cuh"

namespace mpk {

struct NoResidual {
  static __device__ __forceinline__ float load(const Worker&, int, int) { return 0.f; }
};

template <class Residual, class Parts, class Out>
struct AllReduce {
  static_assert(Parts::features == Out::features, "a sum has the shape of its operands");

  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    const u32 count = entry.hi - entry.lo;
#pragma unroll 2
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = entry.lo + i % count;
      Out::store(w, token, feature, Residual::load(w, token, feature) + Parts::load(w, token, feature));
    }
    w.sync();
    w.release_ready();
    w.signal(entry);
  }
};

}  // namespace mpk
