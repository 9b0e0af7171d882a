// Prologue of a linear whose input is a bf16 activation as it is.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <class Source>
struct Plain {
  static_assert(sizeof(typename Source::type) == 2, "the tensor cores take bf16");
  static_assert(Source::features % 8 == 0, "rows are read eight features at a time");

  static __device__ __forceinline__ bool prepare(Worker&, const Entry&, bool) { return false; }

  static __device__ void fill(const Worker& w, const Panel& panel) {
    const int count = (panel.hi - panel.lo) / 8;
#pragma unroll 4
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = panel.lo + i % count * 8;
      *reinterpret_cast<uint4*>(w.activations() + (token * panel.stride() + feature - panel.lo) * 2) =
          ptx::load_l2_16(Source::at(w, token, feature));
    }
  }
};

}  // namespace mpk
