// A tensor that ranks have parts of: every rank writes its part into its slot of every rank's inbox.
//
// Inbox: float32 [ranks][tokens][features] in symmetric memory. Readers add the slots in rank order, so that all ranks get the
// same bits. A slot is written again only after every rank has read it: the plan's sums over ranks keep the ranks together.
// Through NVSHMEM the same holds for what a put has not read yet.
#pragma once
#include "tasks/rmsnorm.cuh"

namespace mpk {

// `Slot`: bytes of one rank's part. `Copy`: where there is one, the inbox lies twice and its values cross as data, as those of
// Turns (tasks/tensor.cuh) do; who clears a rank's part of the other copy is that rank. Through NVSHMEM, whose puts come in
// any order, readers wait for events all the same, and nothing needs to be cleared.
template <u64 Offset, int Features, u64 Slot, u64 Copy = 0, Turn When = of_layer>
struct Inbox {
  static constexpr int features = Features;
  static constexpr u64 slot_bytes = Slot;
  static constexpr bool crosses = Copy != 0 && !through_nvshmem;
  using type = float;

  static __device__ __forceinline__ bool second(const Worker& w) { return Copy != 0 && is_second_copy<When>(w); }
  static __device__ __forceinline__ u8* at(const Worker& w, u32 rank, int token, int feature) {
    return w.params.inbox + Offset + (second(w) ? Copy : 0) + rank * Slot +
           (static_cast<u64>(token) * Features + feature) * sizeof(float);
  }

  // Stores this rank's part, on every rank; through NVSHMEM only here, and the warp that signals puts it there.
  template <class T>
  static __device__ __forceinline__ void store_everywhere(const Worker& w, int token, int feature, T value) {
    T* here = reinterpret_cast<T*>(at(w, w.params.rank, token, feature));
    if constexpr (through_nvshmem) {
      *here = value;
    } else {
#pragma unroll
      for (u32 peer = 0; peer < num_ranks; ++peer) *w.params.on(peer, here) = value;
    }
  }
  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, float value) {
    put(w, token, feature, __float_as_uint(value));
  }
  template <class V>
  static __device__ __forceinline__ void put(const Worker& w, int token, int feature, V bits) {
    if constexpr (!crosses) {
      store_everywhere(w, token, feature, bits);
    } else {
      u8* here = at(w, w.params.rank, token, feature);
      u8* other = second(w) ? here - Copy : here + Copy;
#pragma unroll
      for (u32 peer = 0; peer < num_ranks; ++peer) ptx::show_system(w.params.on(peer, here), bits);
      if (token != 0) return;
      clear(bits);
#pragma unroll
      for (u32 peer = 0; peer < num_ranks; ++peer) ptx::show_system(w.params.on(peer, other), bits);
    }
  }

  // The features [lo, hi) of this rank's part.
  static __device__ __forceinline__ Outgoing outgoing(const Worker& w, int lo, int hi) {
    return {at(w, w.params.rank, 0, lo), static_cast<u32>((hi - lo) * sizeof(float)), Features * sizeof(float)};
  }

  static __device__ __forceinline__ void look(const u8* from, u32& v) {
    if constexpr (crosses)
      ptx::look_system(from, v);
    else
      v = ptx::load_l2_4(from);
  }
  static __device__ __forceinline__ void look(const u8* from, uint2& v) {
    if constexpr (crosses)
      ptx::look_system(from, v);
    else
      v = ptx::load_l2_8(from);
  }
  static __device__ __forceinline__ void look(const u8* from, uint4& v) {
    if constexpr (crosses)
      ptx::look_system(from, v);
    else
      v = ptx::load_l2_16(from);
  }
  template <class V>
  static __device__ __forceinline__ bool is_missing(V v) {
    return crosses && is_cleared<float>(v);
  }

  // The sum of all parts.
  static __device__ __forceinline__ float load(const Worker& w, int token, int feature) {
    u32 part[num_ranks];
#pragma unroll
    for (u32 rank = 0; rank < num_ranks; ++rank) look(at(w, rank, token, feature), part[rank]);
#pragma unroll
    for (u32 rank = 0; rank < num_ranks; ++rank)
      for (u32 looks = 0; is_missing(part[rank]) && w.keeps_looking(looks);) look(at(w, rank, token, feature), part[rank]);
    float total = __uint_as_float(part[0]);
#pragma unroll
    for (u32 rank = 1; rank < num_ranks; ++rank) total += __uint_as_float(part[rank]);
    return total;
  }
};

// The same of a sum in two shots: each rank adds up its share of the features, and gets of the others only those.
template <u64 Offset, int Features, u64 Slot>
struct Scattered : Inbox<Offset, Features, Slot> {
  static constexpr int share = Features / static_cast<int>(num_ranks);
  static_assert(Features % static_cast<int>(num_ranks) == 0 && share % 4 == 0, "shares are whole vectors");

  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, float value) {
    float* here = reinterpret_cast<float*>(Inbox<Offset, Features, Slot>::at(w, w.params.rank, token, feature));
    *w.params.on(feature / share, here) = value;
  }
};

// What the ranks have added up of their shares, float32 [tokens][features]: each writes its features on every rank. They are
// written again only after every rank has read them, as the slots above are.
template <u64 Offset, int Features>
struct Gathered : Tensor<Offset, Features, float> {
  template <class V>
  static __device__ void put(const Worker&, int, int, V) = delete;  // it would go into the arena
  static __device__ void store(const Worker&, int, int, float) = delete;

  static __device__ __forceinline__ u8* at(const Worker& w, int token, int feature) {
    return w.params.inbox + Offset + (static_cast<u64>(token) * Features + feature) * sizeof(float);
  }
  static __device__ __forceinline__ float load(const Worker& w, int token, int feature) {
    return __uint_as_float(ptx::load_l2_4(at(w, token, feature)));
  }
  static __device__ __forceinline__ void store_everywhere(const Worker& w, int token, int feature, float4 value) {
    float4* here = reinterpret_cast<float4*>(at(w, token, feature));
#pragma unroll
    for (u32 peer = 0; peer < num_ranks; ++peer) *w.params.on(peer, here) = value;
  }
};

// Source of a norm: four neighbouring features of the residual and the sum of all parts.
template <class Residual, class Parts>
struct SumRow {
  static constexpr int features = Parts::features;
  static constexpr int vectors = 1 + static_cast<int>(num_ranks);
  static_assert(sizeof(typename Residual::type) == 4 && Residual::features == features, "the residual stream is float32");

  struct From {
    const u8 *residual, *parts;
  };
  struct Raw {
    uint4 residual, part[num_ranks];
  };
  static __device__ __forceinline__ From of(const Worker& w, int token) {
    return {Residual::at(w, token, 0), Parts::at(w, 0, token, 0)};
  }
  static __device__ __forceinline__ void look(From row, int feature, Raw& v) {
    Residual::look(row.residual + feature * 4, v.residual);
#pragma unroll
    for (u32 rank = 0; rank < num_ranks; ++rank) Parts::look(row.parts + rank * Parts::slot_bytes + feature * 4, v.part[rank]);
  }
  static __device__ __forceinline__ bool is_missing(const Raw& v) {
    bool missing = Residual::is_missing(v.residual);
#pragma unroll
    for (u32 rank = 0; rank < num_ranks; ++rank) missing |= Parts::is_missing(v.part[rank]);
    return missing;
  }
  // For what is missing only: the parts of several ranks come at different times.
  static __device__ __forceinline__ void look_again(From row, int feature, Raw& v) {
    if (Residual::is_missing(v.residual)) Residual::look(row.residual + feature * 4, v.residual);
#pragma unroll
    for (u32 rank = 0; rank < num_ranks; ++rank)
      if (Parts::is_missing(v.part[rank])) Parts::look(row.parts + rank * Parts::slot_bytes + feature * 4, v.part[rank]);
  }
  static __device__ __forceinline__ float4 value(const Raw& v) {
    float4 total = floats(v.part[0]);
#pragma unroll
    for (u32 rank = 1; rank < num_ranks; ++rank) total = sum(total, floats(v.part[rank]));
    return sum(floats(v.residual), total);
  }

 private:
  static __device__ __forceinline__ float4 sum(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
};

template <u64 Offset, int Features, u64 Slot, u64 Copy, Turn When>
constexpr bool is_inbox<Inbox<Offset, Features, Slot, Copy, When>> = true;

template <int Groups, class... Parts>
struct ForPeers<Store<Groups, Parts...>> {
  static_assert(!(is_inbox<typename Parts::out> || ...), "a weight whose results other ranks get is packed alone");
  static __device__ __forceinline__ Outgoing of(const Worker&, const Entry&) { return {}; }
};
template <u64 Offset, int Features, u64 Slot, u64 Copy, Turn When, int Rows, class Bias>
struct ForPeers<Store<1, Part<Inbox<Offset, Features, Slot, Copy, When>, Rows, Bias>>> {
  static __device__ __forceinline__ Outgoing of(const Worker& w, const Entry& entry) {
    return Inbox<Offset, Features, Slot, Copy, When>::outgoing(w, entry.lo, entry.hi);
  }
};

template <class T>
constexpr int parts_of = is_inbox<T> ? static_cast<int>(num_ranks) : 1;

// Pairs [tokens, slices, 2], of one rank or in an inbox.
template <class Pairs>
__device__ __forceinline__ void store_pair(const Worker& w, int token, int slice, float2 pair) {
  Pairs::put(w, token, slice * 2, bits_of(pair));
}

// What of the pairs [tokens, lo to hi, 2] peers get.
template <class Pairs>
__device__ __forceinline__ Outgoing outgoing_pairs(const Worker& w, int lo, int hi) {
  if constexpr (is_inbox<Pairs>) return Pairs::outgoing(w, lo * 2, hi * 2);
  return {};
}

template <class Pairs>
__device__ __forceinline__ const u8* pair_at(const Worker& w, int token, u32 rank, int slice) {
  if constexpr (is_inbox<Pairs>)
    return Pairs::at(w, rank, token, slice * 2);
  else
    return Pairs::at(w, token, slice * 2);
}

}  // namespace mpk
