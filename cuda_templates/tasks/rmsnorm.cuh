// Prologue of a linear: every task normalises the whole row again, which is cheaper than another hop between SMs.
//
// Shared memory: Shared::reduce, Shared::rstd. The normalised value is rounded to bf16 before the gain unless the gain has
// an offset, as in transformers' modeling files. Sums of squares: each thread its features in order, then lanes, then warps
// in pairs.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

__device__ __forceinline__ float4 floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// A source: four neighbouring features of a float32 activation. `of`: a token's row; `Raw`: what is loaded for them, of
// `vectors` vectors, which may be missing yet.
template <class Activation>
struct Row {
  static constexpr int features = Activation::features;
  static constexpr int vectors = 1;
  static_assert(sizeof(typename Activation::type) == 4, "the residual stream is float32");

  using From = const u8*;
  using Raw = uint4;
  static __device__ __forceinline__ From of(const Worker& w, int token) { return Activation::at(w, token, 0); }
  static __device__ __forceinline__ void look(From row, int feature, Raw& v) { Activation::look(row + feature * 4, v); }
  static __device__ __forceinline__ bool is_missing(Raw v) { return Activation::is_missing(v); }
  static __device__ __forceinline__ void look_again(From row, int feature, Raw& v) { look(row, feature, v); }
  static __device__ __forceinline__ float4 value(Raw v) { return floats(v); }
};

// Four neighbouring features, as soon as they are there.
template <class Source>
__device__ __forceinline__ float4 settled(const Worker& w, typename Source::From row, int feature) {
  typename Source::Raw v;
  Source::look(row, feature, v);
#pragma unroll 1
  for (u32 looks = 0; Source::is_missing(v) && w.keeps_looking(looks);) Source::look_again(row, feature, v);
  return Source::value(v);
}

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
  static constexpr int at_once = min_of(per_thread, max_of(1, 12 / Source::vectors));  // so many that registers hold them
  static constexpr bool fits_one_token = per_thread <= 8 && Panel::fits_one_token(features);
  static_assert(features % 4 == 0, "rows are read four features at a time");

  // Fills the panel too, and says so, where one token's row fits into registers.
  static __device__ bool prepare(Worker& w, const Entry& entry, const Panel&) {
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
      panel.store_four(w, token, feature, four(w, token, feature));
    }
  }

  // Four neighbouring features of a token, unless `prepare` has filled the panel.
  static __device__ __forceinline__ uint2 four(const Worker& w, int token, int feature) {
    return scaled(load(Source::of(w, token), feature), w.shared.rstd[token], gain(w, feature));
  }

 private:
  // Of steps that wait for events.
  static __device__ __forceinline__ float4 load(typename Source::From row, int feature) {
    typename Source::Raw v;
    Source::look(row, feature, v);
    return Source::value(v);
  }

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
    float part[worker_warps];
#pragma unroll
    for (u32 i = 0; i < worker_warps; ++i) part[i] = w.shared.reduce[token * worker_warps + i];
    return rsqrtf(sum_in_pairs(part) / features + (probe::planted(w.params, probe::wrong_eps) ? 0.05f : Eps));
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
    for (int n = 0; n < per_thread; ++n)
      if (w.thread + n * worker_threads < vectors) g[n] = gain(w, (w.thread + n * worker_threads) * 4);
#pragma unroll
    for (int first = 0; first < per_thread; first += at_once) look(w, row, first, x);
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

  // Vectors `first` and following of this thread: looks again for all that is missing, until nothing is.
  static __device__ __forceinline__ void look(
      const Worker& w, typename Source::From row, int first, float4 (&x)[per_thread]) {
    typename Source::Raw raw[at_once] = {};
#pragma unroll
    for (int n = 0; n < at_once; ++n)
      if (has(w, first + n)) Source::look(row, (w.thread + (first + n) * worker_threads) * 4, raw[n]);
    look_until_there<at_once>(w, [&](int n) {
      if (!Source::is_missing(raw[n])) return false;
      Source::look_again(row, (w.thread + (first + n) * worker_threads) * 4, raw[n]);
      return true;
    });
#pragma unroll
    for (int n = 0; n < at_once; ++n)
      if (first + n < per_thread) x[first + n] = Source::value(raw[n]);
  }
  static __device__ __forceinline__ bool has(const Worker& w, int n) {
    return n < per_thread && static_cast<int>(w.thread + n * worker_threads) < vectors;
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
    for (int i = w.thread; i < vectors; i += worker_threads) settled<Source>(w, row, i * 4);
    w.sync();
  }

  static __device__ void statistics(Worker& w) {
    for (u32 token = 0; token < w.tokens; ++token) {
      const auto row = Source::of(w, token);
      float sum = 0.f;
#pragma unroll 4
      for (int i = w.thread; i < vectors; i += worker_threads) add_squares(sum, load(row, i * 4));
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
      publish_vector(w, entry, token, feature, load(Source::of(w, token), feature));
    }
  }
};

}  // namespace mpk
