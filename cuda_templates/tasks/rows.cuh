// Operators on rows as tasks of their own: norms, sums, activations, embedding, rope, where the spec fuses them with nothing.
//
// Entry: features [lo, hi) of all tokens. Shared memory: NormRows those of the norm and a row of activations, Rows none.
// Registers: Rows keeps a task's values of one token, at most 16 in a thread. All of one token's inputs have been seen before
// anything is stored, since whoever sees a value takes its task to be done with what it read.
#pragma once
#include "tasks/embedding.cuh"
#include "tasks/gated_act.cuh"
#include "tasks/heads.cuh"

namespace mpk {

// One value of a tensor: asked for together with others, and waited for when it is needed.
template <class T>
struct Asked {
  using Bits = decltype(bits_of<typename T::type>(0.f));
  const u8* from;
  Bits bits;

  __device__ __forceinline__ Asked(const Worker& w, int token, int feature) : from(T::at(w, token, feature)) {
    T::look(from, bits);
  }
  __device__ __forceinline__ float settled(const Worker& w) {
    T::settle(w, from, bits);
    return value(bits);
  }
  static __device__ __forceinline__ float value(Bits bits) {
    if constexpr (sizeof(Bits) == 4)
      return __uint_as_float(bits);
    else
      return ptx::widen_bf16(bits);
  }
};

// What the rows are: a lane computes `per` neighbouring features of a token, its warp 32 times as many (a head, where they
// are computed together).
//
// The sum of several tensors, in order.
template <class... Terms>
struct Sum {
  static constexpr int per = 1;
  static __device__ __forceinline__ void of(const Worker& w, int token, int feature, float (&x)[per]) {
    x[0] = in_order(w, Asked<Terms>(w, token, feature)...);
  }

 private:
  template <class First, class... Rest>
  static __device__ __forceinline__ float in_order(const Worker& w, First first, Rest... rest) {
    float total = first.settled(w);
    ((total += rest.settled(w)), ...);
    return total;
  }
};

template <class Fn, class Gate, class Up>
struct Gated {
  static constexpr int per = 1;
  static __device__ __forceinline__ void of(const Worker& w, int token, int feature, float (&x)[per]) {
    Asked<Gate> gate(w, token, feature);
    Asked<Up> up(w, token, feature);
    x[0] = Fn::apply(gate.settled(w)) * up.settled(w);
  }
};

template <u64 Offset, int Features, float Scale>
struct Embedded {
  static constexpr int per = 1;
  static __device__ __forceinline__ void of(const Worker& w, int token, int feature, float (&x)[per]) {
    const u8* row = EmbeddingRow<Offset, Features, Scale>::of(w, token);
    x[0] = ptx::widen_bf16(ptx::load_constant_2(row + feature * 2)) * Scale;
  }
};

// This lane's features of a head.
template <class In, int N>
__device__ __forceinline__ void take_features(const Worker& w, int token, int feature, float (&x)[N]) {
  constexpr u64 size = sizeof(typename In::type);
  const u8* from = In::at(w, token, feature);
  typename Asked<In>::Bits bits[N];
#pragma unroll
  for (int i = 0; i < N; ++i) In::look(from + i * size, bits[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    In::settle(w, from + i * size, bits[i]);
    x[i] = Asked<In>::value(bits[i]);
  }
}

// Each head normed by itself. `Norms`: HeadNorms, of which the first gain is taken.
template <class In, int Dim, class Norms>
struct NormedHeads {
  static constexpr int per = Dim / static_cast<int>(warp_size);
  static __device__ __forceinline__ void of(const Worker& w, int token, int feature, float (&x)[per]) {
    float gain[per];
    Norms::load(w, false, gain);
    take_features<In>(w, token, feature, x);
    Norms::apply(gain, x);
  }
};

template <class In, int Dim, class Rotary>
struct RotatedHeads {
  static constexpr int per = Dim / static_cast<int>(warp_size);
  static __device__ __forceinline__ void of(const Worker& w, int token, int feature, float (&x)[per]) {
    float2 turn[per];
    Rotary::load(w, w.position + token, turn);
    take_features<In>(w, token, feature, x);
    Rotary::apply(w, turn, x);
  }
};

// Values of `Out`. `Most`: features of a task. Every warp takes pieces of a row that its lanes compute together; where `per`
// is more than 1, tasks are whole pieces.
template <int Most, class Out, class Value>
struct Rows {
  static constexpr int per = Value::per, piece = per * static_cast<int>(warp_size);
  static constexpr int pieces = ceil_div(ceil_div(Most, piece), worker_warps);  // of a warp, of one token
  static_assert(pieces * per <= 16, "one token's values are kept in registers");

  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    if (w.tokens == 1)
      one_token(w, entry);
    else
      several_tokens(w, entry);
    w.release_ready();
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ void one_token(const Worker& w, const Entry& entry) {
    float x[pieces][per] = {};  // on every path, or the registers would count as in use in other tasks too
    const int first = entry.lo + static_cast<int>(w.warp) * piece + static_cast<int>(w.lane) * per;
    constexpr int apart = worker_warps * piece;
#pragma unroll
    for (int n = 0; n < pieces; ++n)
      if (first + n * apart < entry.hi) Value::of(w, 0, first + n * apart, x[n]);
    w.sync();
    w.mark_seen();
#pragma unroll
    for (int n = 0; n < pieces; ++n)
      if (first + n * apart < entry.hi) store(w, 0, first + n * apart, x[n]);
  }

  static __device__ __forceinline__ void several_tokens(const Worker& w, const Entry& entry) {
    const u32 count = ceil_div(entry.hi - entry.lo, piece);
#pragma unroll 1
    for (u32 i = w.warp; i < count * w.tokens; i += worker_warps) {
      const int token = i / count, feature = entry.lo + i % count * piece + w.lane * per;
      if (feature >= entry.hi) continue;
      float x[per] = {};
      Value::of(w, token, feature, x);
      store(w, token, feature, x);
    }
    w.sync();
    w.mark_seen();
  }

  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, const float (&x)[per]) {
#pragma unroll
    for (int i = 0; i < per; ++i) Out::store(w, token, feature + i, x[i]);
  }
};

// A norm over whole rows, of which a task stores its part: with the bits that a linear's prologue makes of it.
template <class Norm, class Out>
struct NormRows {
  static_assert(sizeof(typename Out::type) == 2, "the norm makes bf16");
  static_assert(Norm::features == Out::features, "a norm has the shape of its rows");

  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    const Panel row{0, Norm::features};
    const bool filled = Norm::prepare(w, entry, row);  // with one token's whole row
    w.sync();
    w.mark_seen();
    const u32 count = (entry.hi - entry.lo) / 4;
#pragma unroll 1
    for (u32 i = w.thread; i < count * w.tokens; i += worker_threads) {
      const int token = i / count, feature = entry.lo + i % count * 4;
      Out::put(w, token, feature, filled ? four_of(w, row, feature) : Norm::four(w, token, feature));
    }
    w.release_ready();
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ uint2 four_of(const Worker& w, const Panel& row, int feature) {
    const u32* at = row.at(w, 0, feature);
    return make_uint2(at[0], at[4]);
  }
};

}  // namespace mpk
