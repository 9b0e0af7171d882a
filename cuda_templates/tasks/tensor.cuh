// Where tasks read and write: activations in the arena, small vectors of weights.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// Bits of a value, or of neighbouring ones: u16, u32, uint2 or uint4.
template <class T>
__device__ __forceinline__ auto bits_of(float value) {
  if constexpr (sizeof(T) == 4)
    return __float_as_uint(value);
  else
    return ptx::round_bf16(value);
}
// The value as a tensor of `T` holds it.
template <class T>
__device__ __forceinline__ float as_stored(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return ptx::widen_bf16(ptx::round_bf16(value));
}
__device__ __forceinline__ uint2 bits_of(float2 v) { return make_uint2(__float_as_uint(v.x), __float_as_uint(v.y)); }
__device__ __forceinline__ uint4 bits_of(float4 v) {
  return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
}

// A tensor [tokens, features] at `offset` of the activation arena. Events say when its values are there.
template <u64 Offset, int Features, class T>
struct Tensor {
  static constexpr int features = Features;
  using type = T;

  static __device__ __forceinline__ u8* at(const Worker& w, int token, int feature) {
    return w.arena + Offset + (static_cast<u64>(token) * Features + feature) * sizeof(T);
  }
  template <class V>
  static __device__ __forceinline__ void put(const Worker& w, int token, int feature, V bits) {
    *reinterpret_cast<V*>(at(w, token, feature)) = bits;
  }
  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, float value) {
    put(w, token, feature, bits_of<T>(value));
  }
  static __device__ __forceinline__ void look(const u8* from, u16& v) { v = ptx::load_l2_2(from); }
  static __device__ __forceinline__ void look(const u8* from, u32& v) { v = ptx::load_l2_4(from); }
  static __device__ __forceinline__ void look(const u8* from, uint2& v) { v = ptx::load_l2_8(from); }
  static __device__ __forceinline__ void look(const u8* from, uint4& v) { v = ptx::load_l2_16(from); }
  // Whether something is not there yet.
  template <class V>
  static __device__ __forceinline__ bool is_missing(V) {
    return false;
  }
  // Looks again until all is there.
  template <class V>
  static __device__ __forceinline__ void settle(const Worker&, const u8*, V&) {}

  static __device__ __forceinline__ float load(const Worker& w, int token, int feature) {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(ptx::load_l2_4(at(w, token, feature)));
    else
      return ptx::widen_bf16(ptx::load_l2_2(at(w, token, feature)));
  }
};

// Whether some value is what a cleared copy holds. No result of arithmetic has these bits: NaN comes out as 0x7f....
template <class T>
__device__ __forceinline__ bool is_cleared(u32 word) {
  if constexpr (sizeof(T) == 4) return word == 0xffffffffu;
  return ((~word - 0x00010001u) & word & 0x80008000u) != 0;  // one of two halves is 0xffff
}
template <class T>
__device__ __forceinline__ bool is_cleared(uint2 v) { return is_cleared<T>(v.x) | is_cleared<T>(v.y); }
template <class T>
__device__ __forceinline__ bool is_cleared(uint4 v) {
  return is_cleared<T>(make_uint2(v.x, v.y)) | is_cleared<T>(make_uint2(v.z, v.w));
}
__device__ __forceinline__ void clear(u16& v) { v = 0xffff; }
__device__ __forceinline__ void clear(u32& v) { v = 0xffffffffu; }
__device__ __forceinline__ void clear(uint2& v) { v = make_uint2(0xffffffffu, 0xffffffffu); }
__device__ __forceinline__ void clear(uint4& v) { v = make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu); }

// Which copy of a tensor that lies twice: of the write in this layer, in the layer before, or in this step's first layer.
enum Turn : u32 { of_layer, of_layer_before, of_step };

template <Turn When>
__device__ __forceinline__ bool is_second_copy(const Worker& w) {
  if (When == of_step) return w.step_index & 1;
  return (w.layers_run() + (When == of_layer_before)) & 1;
}

// A tensor whose values cross as data: in a step of one token its readers look at them until all are there. It lies twice,
// `Copy` bytes apart, and writes take turns: whoever writes a part of one copy clears it in the other, where it will write the
// next time. That is done of the first token only, since steps of several wait for events. Memory is cleared before a launch.
template <u64 Offset, int Features, class T, u64 Copy, Turn When>
struct Turns {
  static constexpr int features = Features;
  using type = T;

  static __device__ __forceinline__ bool second(const Worker& w) { return is_second_copy<When>(w); }
  static __device__ __forceinline__ u8* at(const Worker& w, int token, int feature) {
    return w.arena + Offset + (second(w) ? Copy : 0) + (static_cast<u64>(token) * Features + feature) * sizeof(T);
  }

  template <class V>
  static __device__ __forceinline__ void put(const Worker& w, int token, int feature, V bits) {
    u8* to = at(w, token, feature);
    ptx::show(to, bits);
    if (token != 0) return;
    clear(bits);
    ptx::show(second(w) ? to - Copy : to + Copy, bits);
  }
  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, float value) {
    put(w, token, feature, bits_of<T>(value));
  }
  template <class V>
  static __device__ __forceinline__ void look(const u8* from, V& v) {
    ptx::look(from, v);
  }
  template <class V>
  static __device__ __forceinline__ bool is_missing(V v) {
    return is_cleared<T>(v);
  }
  template <class V>
  static __device__ __forceinline__ void settle(const Worker& w, const u8* from, V& v) {
#pragma unroll 1
    for (u32 looks = 0; is_cleared<T>(v) && w.keeps_looking(looks);) ptx::look(from, v);
  }

  static __device__ __forceinline__ float load(const Worker& w, int token, int feature) {
    const u8* from = at(w, token, feature);
    if constexpr (sizeof(T) == 4) {
      u32 v;
      look(from, v);
      settle(w, from, v);
      return __uint_as_float(v);
    } else {
      u16 v;
      look(from, v);
      settle(w, from, v);
      return ptx::widen_bf16(v);
    }
  }
};

// Looks again until nothing is missing. `again(n)`, for each of the `Count` things that a thread waits for: whether it is
// missing, after having asked for it once more. All that is missing is asked for at once, and costs one trip.
template <int Count, class Again>
__device__ __forceinline__ void look_until_there(const Worker& w, Again again) {
  bool missing = true;
#pragma unroll 1
  for (u32 looks = 0; missing && w.keeps_looking(looks);) {
    missing = false;
#pragma unroll
    for (int n = 0; n < Count; ++n) missing |= again(n);
  }
}

// Whether a tensor is an inbox: see tasks/inbox.cuh.
template <class T>
constexpr bool is_inbox = false;

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
