// Rows of the embedding table, float32: what the first layer's norm reads.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <u64 Offset, int Features, float Scale>
struct EmbeddingRow {
  static constexpr int features = Features;
  static constexpr bool adds_up = false;

  using From = const u8*;
  static __device__ __forceinline__ From of(const Worker& w, int token) {
    return w.params.weights + Offset + static_cast<u64>(w.step->ids[token]) * Features * 2;
  }
  static __device__ __forceinline__ bool is_missing(float4) { return false; }

  // Four neighbouring features of a token.
  static __device__ __forceinline__ float4 load(From row, int feature) {
    const uint2 v = ptx::load_constant_8(row + feature * 2);
    return make_float4(ptx::low_bf16(v.x) * Scale, ptx::high_bf16(v.x) * Scale, ptx::low_bf16(v.y) * Scale,
                       ptx::high_bf16(v.y) * Scale);
  }
};

}  // namespace mpk
