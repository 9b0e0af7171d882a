// Epilogue of a linear: adds the result to another value, the residual stream, in float32.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <class Residual, class Out, class Bias>
struct AddResidual {
  static_assert(Residual::features == Out::features, "a sum has the shape of its operands");
  using Bits = decltype(bits_of<typename Residual::type>(0.f));
  struct Early {  // the residual's value of this thread's first result, asked for before the weights are waited for
    Bits bits = 0;
  };

  // Asks for result `i`'s residual. Where it crosses as data it may not be there yet, which is looked at when it is needed.
  static __device__ __forceinline__ void ask(const Worker& w, const Block& block, u32 i, Bits& bits) {
    if (const u8* from = place(w, block, i)) Residual::look(from, bits);
  }
  static __device__ __forceinline__ float residual(const Worker& w, const Block& block, u32 i, Bits bits) {
    if (const u8* from = place(w, block, i)) Residual::settle(w, from, bits);
    if constexpr (sizeof(Bits) == 4)
      return __uint_as_float(bits);
    else
      return ptx::widen_bf16(bits);
  }

  static __device__ __forceinline__ void load_early(const Worker& w, const Block& block, Early& early) {
    if (w.thread < block.tiles * tile_rows * w.tokens) ask(w, block, w.thread, early.bits);
  }

  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const Early& early) {
    Bits bits = early.bits;
#pragma unroll 1
    for (u32 i = w.thread; i < block.tiles * tile_rows * w.tokens; i += worker_threads) {
      const auto at = Block::place<tile_rows>(i, w.tokens);
      const int row = (block.first + at.tile) * tile_rows + at.row;
      const float product = block.sum(w, at.tile, at.row, at.token);
      if (i != w.thread) ask(w, block, i, bits);
      float before = residual(w, block, i, bits);
      if (probe::planted(w.params, probe::lost_residual)) before = 0.f;
      if (row < Out::features) Out::store(w, at.token, row, before + (product + Bias::load(w, row)));
    }
  }

 private:
  static __device__ __forceinline__ const u8* place(const Worker& w, const Block& block, u32 i) {
    const auto at = Block::place<tile_rows>(i, w.tokens);
    const int row = (block.first + at.tile) * tile_rows + at.row;
    return row < Out::features ? Residual::at(w, at.token, row) : nullptr;
  }
};

}  // namespace mpk
