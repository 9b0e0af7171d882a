// Prologue of a linear: every task normalises the whole row again, which is cheaper than another hop between SMs.
//
// Shared memory: Shared::reduce, Shared::rstd. The normalised value is rounded to bf16 before the gain unless the gain has
// an offset, as in transformers' modeling files. Sums of squares: each thread its features in order, then lanes, then warps.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

__device__ __forceinline__ float4 floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Four neighbouring features of a float32 activation. `of`: a token's row.
template <class Activation>
struct Row {
  static constexpr int features = Activation::features;
  static constexpr bool adds_up = false;
  static_assert(sizeof(typename Activation::type) == 4, "the residual stream is float32");

  using From = const u8*;
  static __device__ __forceinline__ From of(const Worker& w, int token) { return Activation::at(w, token, 0); }
  static __device__ __forceinline__ float4 load(From row, int feature) {
    uint4 v;
    Activation::look(row + feature * 4, v);
    return floats(v);
  }
  static __device__ __forceinline__ bool is_missing(float4 x) { return Activation::is_missing(bits_of(x)); }
};

struct NotPublished {
  static constexpr bool present = false;
};

// Tasks share the work of writing the source's values down for groups that come later.
template <class Out>
struct Published {
  static constexpr bool present = true;
  using out = Out;
};

template <class Source, class Gain, float Eps, float GainOffset, class Publish>
struct RmsNorm {
  static constexpr int features = Source::features;
  static constexpr int vectors = features / 4;
  static constexpr int per_thread = ceil_div(vectors, worker_threads);
  static constexpr bool fits_one_token = per_thread <= 8 && Panel::fits_one_token(features);
  static_assert(features % 4 == 0, "rows are read four features at a time");

  // Fills the panel too, and says so, where one token's row fits into registers.
  static __device__ bool prepare(Worker& w, const Entry& entry, bool) {
    if (fits_one_token && w.tokens == 1) {
      one_token(w, entry);
      return true;
    }
    if constexpr (!fits_one_token)
      if (w.tokens == 1) arrive(w);
    if constexpr (Publish::present) publish(w, entry);
    statistics(w);
    return false;
  }

  static __device__ void fill(const Worker& w, const Panel& panel) {
    const int count = (panel.hi - panel.lo) / 4;
#pragma unroll 1
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = panel.lo + i % count * 4;
      const float4 x = Source::load(Source::of(w, token), feature);
      panel.store_four(w, token, feature, scaled(x, w.shared.rstd[token], gain(w, feature)));
    }
  }

 private:
  static __device__ __forceinline__ uint2 gain(const Worker& w, int feature) {
    if (probe::planted(w.params, probe::missing_gain)) return make_uint2(0x3f803f80u, 0x3f803f80u);  // ones
    return ptx::load_constant_8(Gain::at(w, feature));
  }

  static __device__ __forceinline__ void add_squares(float& sum, float4 x) {
    sum = fmaf(x.x, x.x, sum);
    sum = fmaf(x.y, x.y, sum);
    sum = fmaf(x.z, x.z, sum);
    sum = fmaf(x.w, x.w, sum);
  }

  static __device__ __forceinline__ float over_warp(float sum) {
#pragma unroll
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
    return sum;
  }

  static __device__ __forceinline__ float root(const Worker& w, int token) {
    float total = 0.f;
#pragma unroll
    for (u32 i = 0; i < worker_warps; ++i) total += w.shared.reduce[token * worker_warps + i];
    return rsqrtf(total / features + (probe::planted(w.params, probe::wrong_eps) ? 0.05f : Eps));
  }

  static __device__ __forceinline__ float weighed(float x, float g) {
    if constexpr (GainOffset != 0.f)
      return x * (g + GainOffset);
    else
      return ptx::widen_bf16(ptx::round_bf16(x)) * g;
  }

  static __device__ __forceinline__ uint2 scaled(float4 x, float rstd, uint2 g) {
    return make_uint2(
        ptx::pack_bf16(weighed(x.x * rstd, ptx::low_bf16(g.x)), weighed(x.y * rstd, ptx::high_bf16(g.x))),
        ptx::pack_bf16(weighed(x.z * rstd, ptx::low_bf16(g.y)), weighed(x.w * rstd, ptx::high_bf16(g.y))));
  }

  static __device__ __forceinline__ void one_token(Worker& w, const Entry& entry) {
    float4 x[per_thread] = {};  // on every path, or the registers would count as in use in all other tasks too
    uint2 g[per_thread] = {};
    float sum = 0.f;
    const auto row = Source::of(w, 0);
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      const int i = w.thread + n * worker_threads;
      if (i < vectors) {
        x[n] = Source::load(row, i * 4);
        g[n] = gain(w, i * 4);
      }
    }
    settle(w, row, x);
#pragma unroll
    for (int n = 0; n < per_thread; ++n)
      if (w.thread + n * worker_threads < vectors) add_squares(sum, x[n]);
    sum = over_warp(sum);
    if (w.lane == 0) w.shared.reduce[w.warp] = sum;
    w.sync();
    const float rstd = root(w, 0);
#pragma unroll
    for (int n = 0; n < per_thread; ++n) {
      const int i = w.thread + n * worker_threads;
      if (i < vectors) Panel{0, features}.store_four(w, 0, i * 4, scaled(x[n], rstd, g[n]));
      if constexpr (Publish::present) publish_vector(w, entry, 0, i * 4, x[n]);
    }
  }

  // Looks again for all that is missing, until nothing is.
  static __device__ __forceinline__ void settle(const Worker& w, typename Source::From row, float4 (&x)[per_thread]) {
    bool missing = true;
#pragma unroll 1
    while (missing && w.keeps_looking()) {
      missing = false;
#pragma unroll
      for (int n = 0; n < per_thread; ++n) {
        if (!Source::adds_up && !Source::is_missing(x[n])) continue;
        missing |= Source::is_missing(x[n]);
        if (!Source::adds_up) x[n] = Source::load(row, (w.thread + n * worker_threads) * 4);
      }
      if (!Source::adds_up || !missing) continue;
      // Of several parts all again, at once: a sum waits for its parts, and must not keep the next one from asking for its own.
#pragma unroll
      for (int n = 0; n < per_thread; ++n)
        if (w.thread + n * worker_threads < vectors) x[n] = Source::load(row, (w.thread + n * worker_threads) * 4);
    }
  }

  // Shares are whole vectors.
  static __device__ __forceinline__ void publish_vector(const Worker& w, const Entry& entry, int token, int feature, float4 x) {
    using Out = typename Publish::out;
    static_assert(sizeof(typename Out::type) == 4, "published rows are float32");
    if (feature >= entry.share_lo && feature < entry.share_hi) Out::put(w, token, feature, bits_of(x));
  }

  // All of one token's values are there: for all threads after the next barrier.
  static __device__ void arrive(const Worker& w) {
    const auto row = Source::of(w, 0);
#pragma unroll 1
    for (int i = w.thread; i < vectors; i += worker_threads) {
      float4 x = Source::load(row, i * 4);
      while (Source::is_missing(x) && w.keeps_looking()) x = Source::load(row, i * 4);
    }
    w.sync();
  }

  static __device__ void statistics(Worker& w) {
    for (u32 token = 0; token < w.tokens; ++token) {
      const auto row = Source::of(w, token);
      float sum = 0.f;
#pragma unroll 4
      for (int i = w.thread; i < vectors; i += worker_threads) add_squares(sum, Source::load(row, i * 4));
      sum = over_warp(sum);
      if (w.lane == 0) w.shared.reduce[token * worker_warps + w.warp] = sum;
    }
    w.sync();
    if (w.thread < w.tokens) w.shared.rstd[w.thread] = root(w, w.thread);
    w.sync();
  }

  static __device__ void publish(const Worker& w, const Entry& entry) {
    const int count = (entry.share_hi - entry.share_lo) / 4;
#pragma unroll 1
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = entry.share_lo + i % count * 4;
      publish_vector(w, entry, token, feature, Source::load(Source::of(w, token), feature));
    }
  }
};

}  // namespace mpk
