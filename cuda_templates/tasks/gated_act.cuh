// Epilogue of two linears whose rows are interleaved by eights (8 of the gate, 8 of up): fn(gate) * up, in float32.
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
  struct Early {};

  static __device__ __forceinline__ void load_early(const Worker&, int, int, Early&) {}

  template <class Product>
  static __device__ __forceinline__ void finish(const Worker& w, int first_sub, int subs, const Early&) {
    for (u32 i = w.thread; i < subs / 2 * 8 * w.tokens; i += worker_threads) {
      const auto at = Product::result(i, w.tokens);
      const int feature = (first_sub / 2 + at.sub) * 8 + at.row;
      const float gate = Product::sum(w, 2 * at.sub, at.row, at.token) + GateBias::load(w, feature);
      const float up = Product::sum(w, 2 * at.sub + 1, at.row, at.token) + UpBias::load(w, feature);
      if (feature < Out::features) Out::store(w, at.token, feature, Fn::apply(gate) * up);
    }
  }
};

}  // namespace mpk
