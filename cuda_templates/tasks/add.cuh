// Epilogue of a linear: adds the result to another value, the residual stream, in float32.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <class Residual, class Out, class Bias>
struct AddResidual {
  static_assert(Residual::features == Out::features, "a sum has the shape of its operands");
  struct Early {  // the residual's value of this thread's first result, asked for before the weights are waited for
    float value = 0.f;
  };

  static __device__ __forceinline__ float residual(const Worker& w, const Block& block, u32 i) {
    const auto at = Block::place<tile_rows>(i, w.tokens);
    const int row = (block.first + at.tile) * tile_rows + at.row;
    return row < Out::features ? Residual::load(w, at.token, row) : 0.f;
  }

  static __device__ __forceinline__ void load_early(const Worker& w, const Block& block, Early& early) {
    if (w.thread < block.tiles * tile_rows * w.tokens) early.value = residual(w, block, w.thread);
  }

  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const Early& early) {
#pragma unroll 1
    for (u32 i = w.thread; i < block.tiles * tile_rows * w.tokens; i += worker_threads) {
      const auto at = Block::place<tile_rows>(i, w.tokens);
      const int row = (block.first + at.tile) * tile_rows + at.row;
      const float product = block.sum(w, at.tile, at.row, at.token);
      float before = i == w.thread ? early.value : residual(w, block, i);
      if (probe::planted(w.params, probe::lost_residual)) before = 0.f;
      if (row < Out::features) Out::store(w, at.token, row, before + (product + Bias::load(w, row)));
    }
  }
};

}  // namespace mpk
