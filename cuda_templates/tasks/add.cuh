// Epilogue of a linear: adds the result to another value, the residual stream, in float32.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <class Residual, class Out, class Bias>
struct AddResidual {
  static_assert(Residual::features == Out::features, "a sum has the shape of its operands");
  struct Early {  // the residual's values, asked for before the weights are waited for
    float value[results_per_thread];
  };

  static __device__ __forceinline__ void load_early(const Worker& w, int first_sub, int subs, Early& early) {
#pragma unroll
    for (int n = 0; n < results_per_thread; ++n) {
      const u32 i = w.thread + n * worker_threads;
      if (i >= subs * 8 * w.tokens) continue;
      const u32 rest = i / 8;
      const int row = (first_sub + rest / w.tokens) * 8 + i % 8;
      if (row < Out::features) early.value[n] = Residual::load(w, rest % w.tokens, row);
    }
  }

  template <class Product>
  static __device__ __forceinline__ void finish(const Worker& w, int first_sub, int subs, const Early& early) {
#pragma unroll
    for (int n = 0; n < results_per_thread; ++n) {
      const u32 i = w.thread + n * worker_threads;
      if (i >= subs * 8 * w.tokens) continue;
      const auto at = Product::result(i, w.tokens);
      const int row = (first_sub + at.sub) * 8 + at.row;
      const float product = Product::sum(w, at.sub, at.row, at.token);
      if (row < Out::features) Out::store(w, at.token, row, early.value[n] + (product + Bias::load(w, row)));
    }
  }
};

}  // namespace mpk
