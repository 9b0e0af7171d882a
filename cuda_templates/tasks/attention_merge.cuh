// Prologue of a linear: adds up the splits of an attention, in split order, relative to their common maximum.
//
// Partial results are float32 [tokens, splits, heads, head_dim + 2]: unnormalised sum, maximum, sum of weights. Splits that
// saw no position of a token are not read: which they are follows from the token's position.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <u64 Offset, int Heads, int HeadDim, int Splits, int Block>
struct AttentionMerge {
  static constexpr int row = HeadDim + 2;
  static_assert(HeadDim % 4 == 0, "a thread's four features belong to one head");

  static __device__ __forceinline__ bool prepare(Worker&, const Entry&, bool) { return false; }

  static __device__ void fill(const Worker& w, const Panel& panel) {
    const int count = (panel.hi - panel.lo) / 4;
#pragma unroll 1
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = panel.lo + i % count * 4;
      const int live = min_of(Splits, static_cast<int>(w.position + token) / Block + 1);
      *reinterpret_cast<uint2*>(w.activations() + (token * panel.stride() + feature - panel.lo) * 2) =
          live <= few ? merge_few(w, token, feature, live) : merge_many(w, token, feature, live);
    }
  }

 private:
  static constexpr int few = 4;  // so many splits are loaded at once

  static __device__ __forceinline__ const u8* at(const Worker& w, int token, int split, int head) {
    return w.params.arena + Offset + static_cast<u64>((token * Splits + split) * Heads + head) * row * 4;
  }

  struct Sum {
    float4 top{};
    float bottom = 0.f;

    __device__ __forceinline__ void add(uint2 low, uint2 high, float total, float factor) {
      top.x += __uint_as_float(low.x) * factor;
      top.y += __uint_as_float(low.y) * factor;
      top.z += __uint_as_float(high.x) * factor;
      top.w += __uint_as_float(high.y) * factor;
      bottom += total * factor;
    }
    __device__ __forceinline__ uint2 rounded() const {
      return make_uint2(ptx::pack_bf16(top.x / bottom, top.y / bottom), ptx::pack_bf16(top.z / bottom, top.w / bottom));
    }
  };

  static __device__ __forceinline__ uint2 merge_few(const Worker& w, int token, int feature, int live) {
    const int head = feature / HeadDim, dim = feature % HeadDim;
    uint2 low[few], high[few], stats[few];
#pragma unroll
    for (int s = 0; s < few; ++s) {
      if (s >= live) continue;
      const u8* from = at(w, token, s, head);
      low[s] = ptx::load_l2_8(from + dim * 4);
      high[s] = ptx::load_l2_8(from + dim * 4 + 8);
      stats[s] = ptx::load_l2_8(from + HeadDim * 4);
    }
    float peak = __uint_as_float(stats[0].x);
#pragma unroll
    for (int s = 1; s < few; ++s)
      if (s < live) peak = fmaxf(peak, __uint_as_float(stats[s].x));
    Sum sum;
#pragma unroll
    for (int s = 0; s < few; ++s)
      if (s < live) sum.add(low[s], high[s], __uint_as_float(stats[s].y), ptx::exp_fast(__uint_as_float(stats[s].x) - peak));
    return sum.rounded();
  }

  static __device__ __forceinline__ uint2 merge_many(const Worker& w, int token, int feature, int live) {
    const int head = feature / HeadDim, dim = feature % HeadDim;
    float peak = __uint_as_float(ptx::load_l2_4(at(w, token, 0, head) + HeadDim * 4));
#pragma unroll 4
    for (int s = 1; s < live; ++s) peak = fmaxf(peak, __uint_as_float(ptx::load_l2_4(at(w, token, s, head) + HeadDim * 4)));
    Sum sum;
#pragma unroll 4
    for (int s = 0; s < live; ++s) {
      const u8* from = at(w, token, s, head);
      const uint2 low = ptx::load_l2_8(from + dim * 4), high = ptx::load_l2_8(from + dim * 4 + 8);
      const uint2 stats = ptx::load_l2_8(from + HeadDim * 4);
      sum.add(low, high, __uint_as_float(stats.y), ptx::exp_fast(__uint_as_float(stats.x) - peak));
    }
    return sum.rounded();
  }
};

}  // namespace mpk
