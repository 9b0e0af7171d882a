// The sum over ranks on its own, with the residual that is added to it: where no linear adds up the parts as it loads them.
//
// Entry: features [lo, hi) of all tokens; of SharedSum, in the rank's share. No shared memory; one element, of SharedSum four
// neighbours, per thread at a time.
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
    w.mark_seen();
    w.release_ready();
    w.signal(entry);
  }
};

// Two shots: this rank's share of the sum, for all ranks. The bits are those of a sum in one: parts in rank order, then the
// residual.
template <class Residual, class Parts, class Out>
struct SharedSum {
  static_assert(Parts::features == Out::features, "a sum has the shape of its operands");

  static __device__ void run(Worker& w, const Entry& entry) {
    using Sum = SumRow<Residual, Parts>;
    w.wait_ready();
    const u32 count = (entry.hi - entry.lo) / 4;
    const int first = static_cast<int>(w.params.rank) * Parts::share + entry.lo;
#pragma unroll 1
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = first + i % count * 4;
      Out::store_everywhere(w, token, feature, settled<Sum>(w, Sum::of(w, token), feature));
    }
    w.sync();
    w.mark_seen();
    w.release_ready();
    w.signal(entry);
  }
};

}  // namespace mpk
