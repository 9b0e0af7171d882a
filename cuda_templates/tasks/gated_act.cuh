// Epilogue of two linears whose rows are interleaved by twos (2 of the gate, 2 of up): fn(gate) * up, in float32.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

struct Silu {
  static __device__ __forceinline__ float apply(float x) { return x / (1.f + ptx::exp_fast(-x)); }
};

struct GeluTanh {
  static __device__ __forceinline__ float apply(float x) {
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.f + ptx::exp_fast(-2.f * inner));
  }
};

struct Gelu {
  static __device__ __forceinline__ float apply(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
};

struct Relu {
  static __device__ __forceinline__ float apply(float x) { return fmaxf(x, 0.f); }
};

template <class Fn, class Out, class GateBias, class UpBias>
struct GatedAct {
  static constexpr int features = tile_rows / 2;  // of one tile
  struct Early {};

  static __device__ __forceinline__ void load_early(const Worker&, const Block&, Early&) {}

  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const Early&) {
    block.each<features>(w, [&](u32 i) {
      const auto at = Block::place<features>(i, w.tokens);
      const int feature = (block.first >> 1) + at.tile * features + at.row, row = at.row + (at.row & ~1);
      if (feature * 2 >= block.end) return;
      const float gate = block.sum(w, at.tile, row, at.token) + GateBias::load(w, feature);
      const float up = block.sum(w, at.tile, row + 2, at.token) + UpBias::load(w, feature);
      Out::store(w, at.token, feature, Fn::apply(gate) * up);
    });
  }
};

}  // namespace mpk
