// Where tasks read and write: activations in the arena, small vectors of weights.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// A tensor [tokens, features] at `offset` of the activation arena.
template <u64 Offset, int Features, class T>
struct Tensor {
  static constexpr int features = Features;
  using type = T;

  static __device__ __forceinline__ u8* at(const Worker& w, int token, int feature) {
    return w.params.arena + Offset + (static_cast<u64>(token) * Features + feature) * sizeof(T);
  }
  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, float value) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float*>(at(w, token, feature)) = value;
    else
      *reinterpret_cast<u16*>(at(w, token, feature)) = ptx::round_bf16(value);
  }
  static __device__ __forceinline__ float load(const Worker& w, int token, int feature) {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(ptx::load_l2_4(at(w, token, feature)));
    else
      return ptx::widen_bf16(ptx::load_l2_2(at(w, token, feature)));
  }
};

// A vector of a layer's small weights (gains, biases), bf16.
template <u64 Offset, u64 LayerStride>
struct Vector {
  static constexpr bool present = true;
  static __device__ __forceinline__ const u8* at(const Worker& w, int index) {
    return w.params.weights + Offset + LayerStride * w.layer + index * 2;
  }
  static __device__ __forceinline__ float load(const Worker& w, int index) {
    return ptx::widen_bf16(ptx::load_constant_2(at(w, index)));
  }
};

struct NoVector {
  static constexpr bool present = false;
  static __device__ __forceinline__ float load(const Worker&, int) { return 0.f; }
};

}  // namespace mpk
