// Head norms, RoPE, append and causal attention over one KV head's share of the cache (FlashDecoding, Dao et al. 2023).
//
// Entry: lo = KV head, hi = split worker. Worker w owns the blocks b of positions with b % splits == w: it appends to them and
// nobody else reads them. A block is one page: [K rows | V rows] of one KV head. Block order and everything inside a block
// is fixed, so a row's bits do not depend on the chunk it came in.
//
// Shared memory (the scratch): for at most `rows` rows of queries, q f32, sums f32, scores f32, and V bf16 of one block; new K and
// V bf16 and RoPE rows of 16 tokens. Registers: at most 168. K and V of the first block are asked for before the event.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <int Heads, int KvHeads, int HeadDim, int Splits, int Block>
struct AttentionShape {
  static constexpr int heads = Heads, kv_heads = KvHeads, dim = HeadDim, splits = Splits, block = Block;
  static constexpr int group = Heads / KvHeads;
  static constexpr int rows = 16;  // query rows (tokens x group) of one pass over the cache
  static constexpr int lanes = HeadDim / 8;  // that share one position
  static constexpr int positions_per_warp = warp_size / lanes;
  static constexpr int per_lane = Block / (worker_warps * positions_per_warp);
  static_assert(HeadDim == 32 || HeadDim == 64 || HeadDim == 128, "head_dim is 32, 64 or 128");
  static_assert(Block == 64, "a block of positions is a page of 64");
  static_assert(Heads % KvHeads == 0 && group <= rows, "query heads of one KV head fit one pass");
  static_assert(per_lane >= 1 && per_lane * worker_warps * positions_per_warp == Block, "warps share a block evenly");
};

// Head norm with a gain; rounding as in rmsnorm.cuh.
template <class Gain, float Eps>
struct HeadNorm {
  template <int N>
  static __device__ __forceinline__ void apply(const Worker& w, float (&x)[N]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fmaf(x[i], x[i], sum);
#pragma unroll
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
    const float rstd = rsqrtf(sum / (N * static_cast<int>(warp_size)) + Eps);
#pragma unroll
    for (int i = 0; i < N; ++i)
      x[i] = ptx::widen_bf16(ptx::round_bf16(x[i] * rstd)) * Gain::load(w, w.lane * N + i);
  }
};

struct NoHeadNorm {
  template <int N>
  static __device__ __forceinline__ void apply(const Worker&, float (&)[N]) {}
};

// Rotary dimensions; the table holds (cos, sin) float32 [context][Dims / 2] at element `Offset`.
template <u64 Offset, int Dims>
struct Rope {
  static constexpr int pairs = Dims / 2;
  static __device__ __forceinline__ const float2* row(const Worker& w, int position) {
    return w.params.rope + Offset + static_cast<u64>(position) * pairs;
  }
};

// Output of one split: [tokens, splits, heads, head_dim + 2] float32, or the finished bf16 value where there is one split.
template <class Shape, class Q, class K, class V, class QNorm, class KNorm, class Rotary, u64 CacheOffset, class Out, float Scale>
struct Attention {
  static constexpr int dim = Shape::dim, group = Shape::group, rows = Shape::rows, block = Shape::block;
  static constexpr int page_bytes = 2 * block * dim * 2;
  static constexpr int per_lane = Shape::per_lane;

  struct Scratch {
    float q[rows][dim];
    float sum[rows][dim];
    alignas(16) float score[rows][block];
    float peak[rows], total[rows], factor[rows];
    alignas(16) u16 value[block][dim];
    u16 new_key[max_tokens][dim];
    u16 new_value[max_tokens][dim];
    float2 rope[max_tokens][Rotary::pairs];
  };
  static_assert(sizeof(Scratch) <= scratch_bytes, "attention fits into the scratch");

  struct Cached {
    uint4 key[per_lane], value[per_lane];
  };

  static __device__ void run(Worker& w, const Entry& entry) {
    Scratch& s = *reinterpret_cast<Scratch*>(w.scratch);
    const int head = entry.lo, worker = entry.hi;
    const int first_new = w.position, end = first_new + w.tokens;
    const bool idle = worker * block >= end;  // none of its blocks exist yet
    Cached cached;
    if (!idle) {
      load_block(w, head, worker, first_new, cached);
      for (u32 i = w.thread; i < w.tokens * Rotary::pairs; i += worker_threads) {
        const int token = i / Rotary::pairs, pair = i % Rotary::pairs;
        s.rope[token][pair] = Rotary::row(w, first_new + token)[pair];
      }
    }
    w.wait_ready();
    w.sync();
    w.release_ready();
    if (!idle) {
      append(w, s, head, worker);
      constexpr int tokens_per_pass = rows / group;
      for (int token = 0; token < static_cast<int>(w.tokens); token += tokens_per_pass) {
        const int count = min_of(tokens_per_pass, static_cast<int>(w.tokens) - token);
        if (token) load_block(w, head, worker, first_new, cached);
        one_pass(w, s, head, worker, token, count, cached);
      }
    }
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ u8* page(const Worker& w, int head, int index) {
    const u64 at = static_cast<u64>(w.layer) * w.params.num_pages + w.params.pages[index];
    return w.params.cache + CacheOffset + (at * Shape::kv_heads + head) * page_bytes;
  }

  static __device__ __forceinline__ int position_in_block(const Worker& w, int n) {
    return (n * worker_warps + w.warp) * Shape::positions_per_warp + w.lane / Shape::lanes;
  }

  // Positions that an earlier step wrote; the others come from this step's own keys and values.
  static __device__ __forceinline__ void load_block(const Worker& w, int head, int index, int first_new, Cached& cached) {
    const u8* from = page(w, head, index) + w.lane % Shape::lanes * 16;
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      const int at = position_in_block(w, n);
      cached.key[n] = cached.value[n] = make_uint4(0, 0, 0, 0);
      if (index * block + at < first_new) {
        cached.key[n] = ptx::load_l2_16(from + at * dim * 2);
        cached.value[n] = ptx::load_l2_16(from + (block + at) * dim * 2);
      }
    }
  }

  // Norm and rotation of one head's vector, by one warp; leaves it, rounded to bf16 once, in `to` (shared memory).
  template <class Norm>
  static __device__ __forceinline__ void rotate(const Worker& w, const Scratch& s, const u8* from, int token, float* to) {
    constexpr int per = dim / warp_size;
    float x[per];
#pragma unroll
    for (int i = 0; i < per; ++i) x[i] = ptx::widen_bf16(ptx::load_l2_2(from + (w.lane * per + i) * 2));
    Norm::apply(w, x);
#pragma unroll
    for (int i = 0; i < per; ++i) to[w.lane * per + i] = x[i];
    __syncwarp();
    for (int i = w.lane; i < Rotary::pairs; i += warp_size) {
      const float first = to[i], second = to[i + Rotary::pairs];
      const float2 turn = s.rope[token][i];
      to[i] = first * turn.x - second * turn.y;
      to[i + Rotary::pairs] = second * turn.x + first * turn.y;
    }
    __syncwarp();
    for (int i = w.lane; i < dim; i += warp_size) to[i] = ptx::widen_bf16(ptx::round_bf16(to[i]));
    __syncwarp();
  }

  // New keys and values of the blocks that this worker owns go to the cache and, rounded alike, to shared memory.
  static __device__ void append(const Worker& w, Scratch& s, int head, int worker) {
    for (u32 token = w.warp; token < w.tokens; token += worker_warps) {
      const int position = w.position + token, index = position / block;
      if (index % Shape::splits != worker) continue;
      float* row = s.sum[w.warp];  // not in use yet
      rotate<KNorm>(w, s, K::at(w, token, head * dim), token, row);
      u8* to = page(w, head, index) + position % block * dim * 2;
      for (int i = w.lane; i < dim / 2; i += warp_size) {
        const u32 key = ptx::pack_bf16(row[2 * i], row[2 * i + 1]);
        const u32 value = ptx::load_l2_4(V::at(w, token, head * dim + 2 * i));
        reinterpret_cast<u32*>(s.new_key[token])[i] = key;
        reinterpret_cast<u32*>(s.new_value[token])[i] = value;
        reinterpret_cast<u32*>(to)[i] = key;
        reinterpret_cast<u32*>(to + block * dim * 2)[i] = value;
      }
      __syncwarp();
    }
  }

  static __device__ void one_pass(
      const Worker& w, Scratch& s, int head, int worker, int first_token, int tokens, Cached& cached) {
    const int used = tokens * group;
    w.sync();  // append is done with s.sum
    for (int r = w.warp; r < used; r += worker_warps) {
      const int token = first_token + r / group;
      rotate<QNorm>(w, s, Q::at(w, token, (head * group + r % group) * dim), token, s.q[r]);
    }
    for (int i = w.thread; i < used * dim; i += worker_threads) s.sum[i / dim][i % dim] = 0.f;
    if (static_cast<int>(w.thread) < used) {
      s.peak[w.thread] = -infinity;
      s.total[w.thread] = 0.f;
    }
    w.sync();
    const int last = w.position + first_token + tokens - 1;
    for (int index = worker; index * block <= last; index += Shape::splits) {
      scores(w, s, index, first_token, used, cached);
      const int next = index + Shape::splits;
      if (next * block <= last) load_block(w, head, next, w.position, cached);
      w.sync();
      weights(w, s, used);
      w.sync();
      values(w, s, used);
      w.sync();
    }
    store(w, s, head, worker, first_token, used);
  }

  static __device__ __forceinline__ void widen(const uint4& v, float (&to)[8]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = ptx::low_bf16(words[i]);
      to[2 * i + 1] = ptx::high_bf16(words[i]);
    }
  }

  // s.score[row][position] = q k, scaled and masked; V goes to shared memory.
  static __device__ __forceinline__ void scores(
      const Worker& w, Scratch& s, int index, int first_token, int used, Cached& cached) {
    const int first_dim = w.lane % Shape::lanes * 8;
    float key[per_lane][8];
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      const int at = position_in_block(w, n), fresh = index * block + at - static_cast<int>(w.position);
      if (fresh >= 0 && fresh < static_cast<int>(w.tokens)) {
        cached.key[n] = *reinterpret_cast<const uint4*>(&s.new_key[fresh][first_dim]);
        cached.value[n] = *reinterpret_cast<const uint4*>(&s.new_value[fresh][first_dim]);
      }
      widen(cached.key[n], key[n]);
      *reinterpret_cast<uint4*>(&s.value[at][first_dim]) = cached.value[n];
    }
    for (int r = 0; r < used; ++r) {
      const float4 low = *reinterpret_cast<const float4*>(&s.q[r][first_dim]);
      const float4 high = *reinterpret_cast<const float4*>(&s.q[r][first_dim + 4]);
      const float q[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const int visible = w.position + first_token + r / group - index * block;  // the last position it may see
#pragma unroll
      for (int n = 0; n < per_lane; ++n) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(q[i], key[n][i], sum);
#pragma unroll
        for (int d = Shape::lanes / 2; d; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
        const int at = position_in_block(w, n);
        if (first_dim == 0) s.score[r][at] = at <= visible ? sum * Scale : -infinity;
      }
    }
  }

  // Scores become weights relative to the running maximum.
  static __device__ __forceinline__ void weights(const Worker& w, Scratch& s, int used) {
    for (int r = w.warp; r < used; r += worker_warps) {
      const float a = s.score[r][w.lane], b = s.score[r][w.lane + warp_size];
      float peak = fmaxf(a, b);
#pragma unroll
      for (int d = 16; d; d /= 2) peak = fmaxf(peak, __shfl_xor_sync(all_lanes, peak, d));
      const float before = s.peak[r];
      peak = fmaxf(peak, before);
      const bool blind = peak == -infinity;
      const float x = blind ? 0.f : ptx::exp_fast(a - peak), y = blind ? 0.f : ptx::exp_fast(b - peak);
      float total = x + y;
#pragma unroll
      for (int d = 16; d; d /= 2) total += __shfl_xor_sync(all_lanes, total, d);
      s.score[r][w.lane] = x;
      s.score[r][w.lane + warp_size] = y;
      __syncwarp();
      if (w.lane == 0) {
        const float factor = blind ? 0.f : ptx::exp_fast(before - peak);
        s.factor[r] = factor;
        s.total[r] = s.total[r] * factor + total;
        s.peak[r] = peak;
      }
    }
  }

  // s.sum = s.sum * factor + weights V; a thread has two neighbouring dims of every n-th row.
  static __device__ __forceinline__ void values(const Worker& w, Scratch& s, int used) {
    const int pair = w.thread % (dim / 2);
    for (int r = w.thread / (dim / 2); r < used; r += worker_threads / (dim / 2)) {
      float2 sum = *reinterpret_cast<const float2*>(&s.sum[r][2 * pair]);
      sum.x *= s.factor[r];
      sum.y *= s.factor[r];
#pragma unroll 4
      for (int at = 0; at < block; at += 4) {
        const float4 p = *reinterpret_cast<const float4*>(&s.score[r][at]);
        const float weight[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 v = *reinterpret_cast<const u32*>(&s.value[at + i][2 * pair]);
          sum.x = fmaf(weight[i], ptx::low_bf16(v), sum.x);
          sum.y = fmaf(weight[i], ptx::high_bf16(v), sum.y);
        }
      }
      *reinterpret_cast<float2*>(&s.sum[r][2 * pair]) = sum;
    }
  }

  static __device__ __forceinline__ void store(
      const Worker& w, const Scratch& s, int head, int worker, int first_token, int used) {
    const int pair = w.thread % (dim / 2);
    for (int r = w.thread / (dim / 2); r < used; r += worker_threads / (dim / 2)) {
      const int token = first_token + r / group, query = head * group + r % group;
      const float2 sum = *reinterpret_cast<const float2*>(&s.sum[r][2 * pair]);
      if constexpr (Shape::splits == 1) {
        const float total = s.total[r];
        *reinterpret_cast<u32*>(Out::at(w, token, query * dim + 2 * pair)) = ptx::pack_bf16(sum.x / total, sum.y / total);
      } else {
        const int row = (worker * Shape::heads + query) * (dim + 2);
        *reinterpret_cast<float2*>(Out::at(w, token, row + 2 * pair)) = sum;
        if (pair == 0) *reinterpret_cast<float2*>(Out::at(w, token, row + dim)) = make_float2(s.peak[r], s.total[r]);
      }
    }
  }
};

}  // namespace mpk
