// Rows of the embedding table, float32: what the first layer's norm reads.
#pragma once
#include "tasks/rmsnorm.cuh"

namespace mpk {

template <u64 Offset, int Features, float Scale>
struct EmbeddingRow {
  static constexpr int features = Features;

  using From = const u8*;
  using Raw = uint2;
  static constexpr int vectors = 1;
  static __device__ __forceinline__ From of(const Worker& w, int token) {
    return w.params.weights + Offset + static_cast<u64>(w.step->ids[token]) * Features * 2;
  }
  // Four neighbouring features of a token.
  static __device__ __forceinline__ void look(From row, int feature, Raw& v) { v = ptx::load_constant_8(row + feature * 2); }
  static __device__ __forceinline__ bool is_missing(Raw) { return false; }
  static __device__ __forceinline__ void look_again(From, int, Raw&) {}
  static __device__ __forceinline__ float4 value(Raw v) {
    return make_float4(ptx::low_bf16(v.x) * Scale, ptx::high_bf16(v.x) * Scale, ptx::low_bf16(v.y) * Scale,
                       ptx::high_bf16(v.y) * Scale);
  }
};

}  // namespace mpk
