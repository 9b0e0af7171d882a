// What is done to one head's vector, by one warp: norm with a gain, rotation. Lane l has features l * N to l * N + N - 1.
#pragma once
#include "tasks/tensor.cuh"

namespace mpk {

// Head norm with a gain; rounding as in rmsnorm.cuh. Lane l has features l * N to l * N + N - 1.
template <class QGain, class KGain, float Eps>
struct HeadNorms {
  template <int N>
  static __device__ __forceinline__ void load(const Worker& w, bool key, float (&gain)[N]) {
    const u8* from = (key ? KGain::at(w, 0) : QGain::at(w, 0)) + w.lane * N * 2;
#pragma unroll
    for (int i = 0; i < N; ++i) gain[i] = ptx::widen_bf16(ptx::load_constant_2(from + i * 2));
  }

  template <int N>
  static __device__ __forceinline__ void apply(const float (&gain)[N], float (&x)[N]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fmaf(x[i], x[i], sum);
#pragma unroll
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
    const float rstd = rsqrtf(sum / (N * static_cast<int>(warp_size)) + Eps);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = ptx::widen_bf16(ptx::round_bf16(x[i] * rstd)) * gain[i];
  }
};

struct NoHeadNorms {
  template <int N>
  static __device__ __forceinline__ void load(const Worker&, bool, float (&)[N]) {}
  template <int N>
  static __device__ __forceinline__ void apply(const float (&)[N], float (&)[N]) {}
};

// Rotary dimensions; the table holds (cos, sin) float32 [context][Dims / 2] at element `Offset`.
template <u64 Offset, int Dims>
struct Rope {
  static constexpr int pairs = Dims / 2;

  // The rotations of lane l's features l * N to l * N + N - 1.
  template <int N>
  static __device__ __forceinline__ void load(const Worker& w, int position, float2 (&turn)[N]) {
    const float2* row = w.params.rope + Offset + static_cast<u64>(position) * pairs;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint2 v = ptx::load_constant_8(row + (w.lane * N + i) % pairs);
      turn[i] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
    }
  }

  template <int N>
  static __device__ __forceinline__ void apply(const Worker& w, const float2 (&turn)[N], float (&x)[N]) {
    static_assert(pairs % N == 0 && (pairs / N & (pairs / N - 1)) == 0, "a pair's halves are a power of two of lanes apart");
    constexpr int apart = pairs / N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float other = __shfl_xor_sync(all_lanes, x[i], apart);
      const float sine = w.lane & apart ? turn[i].y : -turn[i].y;
      if (w.lane * N < Dims) x[i] = fmaf(x[i], turn[i].x, other * sine);
    }
  }
};

struct NoRope {
  template <int N>
  static __device__ __forceinline__ void load(const Worker&, int, float2 (&)[N]) {}
  template <int N>
  static __device__ __forceinline__ void apply(const Worker&, const float2 (&)[N], float (&)[N]) {}
};

}  // namespace mpk
