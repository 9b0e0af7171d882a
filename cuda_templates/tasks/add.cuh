// Epilogue of a linear: adds the result to another value, the residual stream, in float32.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <class Residual, class Out, class Bias>
struct AddResidual {
  static_assert(Residual::features == Out::features, "a sum has the shape of its operands");
  using Bits = decltype(bits_of<typename Residual::type>(0.f));
  struct Early {  // the residual's value of this thread's first result, asked for before the weights are waited for
    const u8* from = nullptr;
    Bits bits = 0;
  };

  static __device__ __forceinline__ void load_early(const Worker& w, const Block& block, Early& early) {
    if (w.thread < block.tiles * tile_rows * w.tokens) ask(w, block, w.thread, early);
  }

  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const Early& early) {
    block.each<tile_rows>(w, [&](u32 i) {
      const auto at = Block::place<tile_rows>(i, w.tokens);
      const int row = block.first + at.tile * tile_rows + at.row;
      if (row >= block.end) return;
      const float product = block.sum(w, at.tile, at.row, at.token);
      Early residual = early;
      if (i != w.thread) ask(w, block, i, residual);
      float before = settled(w, residual);
      if (probe::planted(w.params, probe::lost_residual)) before = 0.f;
      Out::store(w, at.token, row, before + (product + Bias::load(w, row)));
    });
  }

 private:
  // Asks for result `i`'s residual. Where it crosses as data it may not be there yet, which is looked at when it is needed.
  static __device__ __forceinline__ void ask(const Worker& w, const Block& block, u32 i, Early& early) {
    const auto at = Block::place<tile_rows>(i, w.tokens);
    const int row = block.first + at.tile * tile_rows + at.row;
    if (row >= block.end) return;
    early.from = Residual::at(w, at.token, row);
    Residual::look(early.from, early.bits);
  }
  static __device__ __forceinline__ float settled(const Worker& w, Early& early) {
    Residual::settle(w, early.from, early.bits);
    if constexpr (sizeof(Bits) == 4)
      return __uint_as_float(early.bits);
    else
      return ptx::widen_bf16(early.bits);
  }
};

}  // namespace mpk
