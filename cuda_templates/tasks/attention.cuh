// Head norms, RoPE, append and causal attention over one KV head's share of the cache (FlashDecoding, Dao et al. 2023).
//
// Entry: lo = KV head, hi = split worker. Worker w owns the blocks b of positions with b % splits == w: it appends to them and
// nobody else reads them. A block is one page: [K rows | V rows] of one KV head. Lanes share a position's vector, groups of
// lanes and warps share a block's positions; every group keeps a running maximum and sum of its own over the blocks, and
// they meet at the end: groups, then warps in order. None of it depends on the chunk that a row came in.
//
// Shared memory (the scratch): queries float32, new K and V bf16, the warps' sums. Registers: at most 168. What does not
// depend on this step (K and V of the first block, gains, rotations) is asked for before the event.
#pragma once
#include "tasks/linear.cuh"

namespace mpk {

template <int Heads, int KvHeads, int HeadDim, int Splits, int Block>
struct AttentionShape {
  static constexpr int heads = Heads, kv_heads = KvHeads, dim = HeadDim, splits = Splits, block = Block;
  static constexpr int group = Heads / KvHeads;
  // Query rows (of tokens x group) of one pass over the cache. Their sums lie in registers: fewer where none can be moved.
  static constexpr int rows = !MPK_MOVES_REGISTERS ? 2 : group <= 4 ? 4 : 8;
  static constexpr int lanes = HeadDim / 8;  // that share one position
  static constexpr int positions_per_warp = warp_size / lanes;
  static constexpr int per_lane = Block / (worker_warps * positions_per_warp);
  static constexpr int at_once = rows > 4 ? 1 : per_lane;  // positions of a lane
  static_assert(HeadDim == 32 || HeadDim == 64 || HeadDim == 128, "head_dim is 32, 64 or 128");
  static_assert(Block == 64, "a block of positions is a page of 64");
  static_assert(Heads % KvHeads == 0, "query heads share KV heads evenly");
  static_assert(per_lane >= 1 && per_lane * worker_warps * positions_per_warp == Block, "warps share a block evenly");
};

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

// Output of one split: [tokens, splits, heads, head_dim + 2] float32, or the finished bf16 value where there is one split.
template <class Shape, class Q, class K, class V, class Norms, class Rotary, u64 CacheOffset, class Out, float Scale>
struct Attention {
  static constexpr int dim = Shape::dim, group = Shape::group, rows = Shape::rows, block = Shape::block;
  static constexpr int page_bytes = 2 * block * dim * 2;
  static constexpr int per_lane = Shape::per_lane, at_once = Shape::at_once;
  static constexpr int per = dim / static_cast<int>(warp_size);  // features of a lane that turns a vector

  struct Scratch {
    float q[rows][dim];
    float sum[worker_warps][rows][dim];
    float peak[worker_warps][rows], total[worker_warps][rows];
    alignas(16) u16 new_key[max_tokens][dim];
    alignas(16) u16 new_value[max_tokens][dim];
  };
  static_assert(sizeof(Scratch) <= scratch_bytes, "attention fits into the scratch");

  struct Cached {
    uint4 key[per_lane], value[per_lane];
  };

  // Softmax of what this lane's group of lanes has seen so far, for each row: 8 features of the weighted sum.
  struct Running {
    float sum[rows][8], peak[rows], total[rows];
  };

  static __device__ void run(Worker& w, const Entry& entry) {
    Scratch& s = *reinterpret_cast<Scratch*>(w.scratch);
    const int head = entry.lo, worker = entry.hi;
    const int queries = w.tokens * group;
    const bool idle = worker * block >= static_cast<int>(w.position + w.tokens);  // none of its blocks exist yet
    for (int row = 0; row < queries; row += rows) {
      const int used = min_of(rows, queries - row);
      Cached cached{};  // initialised on every path, or the registers would count as in use in all other tasks too
      if (!idle) load_block(w, head, worker, w.position, cached);
      turn_vectors(w, s, head, worker, row, used, idle);
      if (idle) break;
      w.sync();
      one_pass(w, s, head, worker, row, used, cached);
      w.sync();
      store(w, s, head, worker, row, used);
      if (row + rows < queries) w.sync();
    }
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ u8* page(const Worker& w, int head, int index) {
    const u64 at = static_cast<u64>(w.layer) * w.params.num_pages + w.params.pages[index];
    return w.params.cache + CacheOffset + (at * Shape::kv_heads + head) * page_bytes;
  }

  // Where earlier steps' keys and values are read.
  static __device__ __forceinline__ const u8* cached_page(const Worker& w, int head, int index) {
    const bool wrong = probe::planted(w.params, probe::wrong_page);  // every second page is the one before it
    return page(w, head, wrong ? index & ~1 : index) + w.lane % Shape::lanes * 16;
  }

  static __device__ __forceinline__ int position_in_block(const Worker& w, int n) {
    return (n * worker_warps + w.warp) * Shape::positions_per_warp + w.lane / Shape::lanes;
  }

  // Positions that an earlier step wrote; the others come from this step's own keys and values.
  static __device__ __forceinline__ void load_block(const Worker& w, int head, int index, int first_new, Cached& cached) {
    const u8* from = cached_page(w, head, index);
    load_rows(w, from, index * block, first_new, cached.key);
    load_rows(w, from + block * dim * 2, index * block, first_new, cached.value);
  }
  static __device__ __forceinline__ void load_rows(
      const Worker& w, const u8* from, int first_position, int first_new, uint4 (&to)[per_lane]) {
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      const int at = position_in_block(w, n);
      to[n] = make_uint4(0, 0, 0, 0);
      if (first_position + at < first_new) to[n] = ptx::load_l2_16(from + at * dim * 2);
    }
  }

  // --- this step's queries, keys and values, a vector to a warp

  static __device__ __forceinline__ void load_vector(const Worker& w, const u8* from, float (&x)[per]) {
    if constexpr (per == 4) {
      const uint2 v = ptx::load_l2_8(from + w.lane * 8);
      x[0] = ptx::low_bf16(v.x), x[1] = ptx::high_bf16(v.x), x[2] = ptx::low_bf16(v.y), x[3] = ptx::high_bf16(v.y);
    } else {
#pragma unroll
      for (int i = 0; i < per; ++i) x[i] = ptx::widen_bf16(ptx::load_l2_2(from + (w.lane * per + i) * 2));
    }
  }

  // The pass's queries go to shared memory; in the first pass also new keys and values of the blocks that this worker owns,
  // which go to the cache too. The first pass waits for the event, once all that does not depend on it has been asked for.
  static __device__ __forceinline__ void turn_vectors(
      Worker& w, Scratch& s, int head, int worker, int first_row, int used, bool idle) {
    const int vectors = idle ? 0 : used + (first_row ? 0 : 2 * w.tokens);
    bool waiting = first_row == 0;
    for (int i = w.warp; waiting || i < vectors; i += worker_warps) {
      const int row = first_row + i, token = i < used ? row / group : (i - used) / 2;
      const bool query = i < used, value = !query && (i - used) % 2;
      const int position = w.position + token;
      const bool mine = i < vectors && (query || position / block % Shape::splits == worker);
      float gain[per] = {};
      float2 angle[per] = {};
      if (mine && !value) {
        Norms::load(w, !query, gain);
        const bool late = query && probe::planted(w.params, probe::late_position);
        Rotary::load(w, late ? min_of<int>(position + 1, w.params.context - 1) : position, angle);
      }
      if (waiting) {
        w.wait_ready();
        w.sync();
        w.release_ready();
        waiting = false;
      }
      if (!mine) continue;
      float x[per];
      load_vector(w, query ? Q::at(w, token, (head * group + row % group) * dim)
                           : (value ? V::at(w, token, head * dim) : K::at(w, token, head * dim)), x);
      if (!value) {
        Norms::apply(gain, x);
        Rotary::apply(w, angle, x);
      }
      u16 bits[per];
#pragma unroll
      for (int n = 0; n < per; ++n) bits[n] = ptx::round_bf16(x[n]);
      if (query) {
#pragma unroll
        for (int n = 0; n < per; ++n) s.q[i][w.lane * per + n] = ptx::widen_bf16(bits[n]);
      } else {
        u8* to = page(w, head, position / block) + ((value ? block : 0) + position % block) * dim * 2;
        u16* shared = value ? s.new_value[token] : s.new_key[token];
#pragma unroll
        for (int n = 0; n < per; ++n) {
          shared[w.lane * per + n] = bits[n];
          reinterpret_cast<u16*>(to)[w.lane * per + n] = bits[n];
        }
      }
    }
  }

  // --- scores, softmax and sum

  static __device__ __forceinline__ void one_pass(
      const Worker& w, Scratch& s, int head, int worker, int first_row, int used, Cached& cached) {
    Running run;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      run.peak[r] = -infinity, run.total[r] = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) run.sum[r][i] = 0.f;
    }
    const int last = w.position + (first_row + used - 1) / group;
    for (int index = worker; index * block <= last; index += Shape::splits) {
      take_new(w, s, index, cached);
      const int next = index + Shape::splits;
      const bool more = next * block <= last;
      const u8* from = more ? cached_page(w, head, next) : nullptr;
#pragma unroll
      for (int n = 0; n < per_lane; n += at_once) {
        float score[rows][at_once] = {};
        scores(w, s, index, n, first_row, used, cached, score);
        if (more && n + at_once == per_lane) load_rows(w, from, next * block, w.position, cached.key);
        weigh(used, score, run);
        add_values(n, used, cached, score, run);
      }
      if (more) load_rows(w, from + block * dim * 2, next * block, w.position, cached.value);
    }
    join_groups(used, run);
    leave(w, s, used, run);
  }

  // Keys and values of this step's own tokens.
  static __device__ __forceinline__ void take_new(const Worker& w, const Scratch& s, int index, Cached& cached) {
    const int first_dim = w.lane % Shape::lanes * 8;
    if ((index + 1) * block <= static_cast<int>(w.position)) return;
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      const int fresh = index * block + position_in_block(w, n) - static_cast<int>(w.position);
      if (fresh < 0 || fresh >= static_cast<int>(w.tokens)) continue;
      cached.key[n] = *reinterpret_cast<const uint4*>(&s.new_key[fresh][first_dim]);
      cached.value[n] = *reinterpret_cast<const uint4*>(&s.new_value[fresh][first_dim]);
    }
  }

  static __device__ __forceinline__ void widen(const uint4& v, float (&to)[8]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = ptx::low_bf16(words[i]), to[2 * i + 1] = ptx::high_bf16(words[i]);
  }

  // score[row][i] = q k of this group's position `first + i` of the block, scaled and masked.
  static __device__ __forceinline__ void scores(
      const Worker& w, const Scratch& s, int index, int first, int first_row, int used, const Cached& cached,
      float (&score)[rows][at_once]) {
    const int first_dim = w.lane % Shape::lanes * 8;
    float key[at_once][8];
#pragma unroll
    for (int n = 0; n < at_once; ++n) widen(cached.key[first + n], key[n]);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (r >= used) continue;
      const float4 low = *reinterpret_cast<const float4*>(&s.q[r][first_dim]);
      const float4 high = *reinterpret_cast<const float4*>(&s.q[r][first_dim + 4]);
      const float q[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int n = 0; n < at_once; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) score[r][n] = fmaf(q[i], key[n][i], score[r][n]);
#pragma unroll
      for (int d = Shape::lanes / 2; d; d /= 2)
#pragma unroll
        for (int n = 0; n < at_once; ++n) score[r][n] += __shfl_xor_sync(all_lanes, score[r][n], d);
      const int visible = w.position + (first_row + r) / group - index * block;  // the last position it may see
#pragma unroll
      for (int n = 0; n < at_once; ++n)
        score[r][n] = position_in_block(w, first + n) <= visible ? score[r][n] * Scale : -infinity;
    }
  }

  // exp(x - peak), 0 where nothing has been seen.
  static __device__ __forceinline__ float relative(float x, float peak) {
    return peak == -infinity ? 0.f : ptx::exp_fast(x - peak);
  }

  // Scores become weights relative to the group's new maximum, and so does the sum.
  static __device__ __forceinline__ void weigh(int used, float (&score)[rows][at_once], Running& run) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (r >= used) continue;
      float peak = run.peak[r];
#pragma unroll
      for (int n = 0; n < at_once; ++n) peak = fmaxf(peak, score[r][n]);
      const float factor = relative(run.peak[r], peak);
      run.peak[r] = peak;
      run.total[r] *= factor;
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        score[r][n] = relative(score[r][n], peak);
        run.total[r] += score[r][n];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) run.sum[r][i] *= factor;
    }
  }

  static __device__ __forceinline__ void add_values(
      int first, int used, const Cached& cached, const float (&weight)[rows][at_once], Running& run) {
#pragma unroll
    for (int n = 0; n < at_once; ++n) {
      float value[8];
      widen(cached.value[first + n], value);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (r >= used) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) run.sum[r][i] = fmaf(weight[r][n], value[i], run.sum[r][i]);
      }
    }
  }

  // The groups of a warp together; the first group's lanes have the result.
  static __device__ __forceinline__ void join_groups(int used, Running& run) {
#pragma unroll
    for (int d = Shape::lanes; d < static_cast<int>(warp_size); d *= 2) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (r >= used) continue;
        const float other = __shfl_xor_sync(all_lanes, run.peak[r], d), peak = fmaxf(run.peak[r], other);
        const float mine = relative(run.peak[r], peak), theirs = relative(other, peak);
        run.peak[r] = peak;
        run.total[r] = run.total[r] * mine + __shfl_xor_sync(all_lanes, run.total[r], d) * theirs;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          run.sum[r][i] = run.sum[r][i] * mine + __shfl_xor_sync(all_lanes, run.sum[r][i], d) * theirs;
      }
    }
  }

  static __device__ __forceinline__ void leave(const Worker& w, Scratch& s, int used, const Running& run) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (r >= used || w.lane >= Shape::lanes) continue;
      float4* to = reinterpret_cast<float4*>(&s.sum[w.warp][r][w.lane * 8]);
      to[0] = make_float4(run.sum[r][0], run.sum[r][1], run.sum[r][2], run.sum[r][3]);
      to[1] = make_float4(run.sum[r][4], run.sum[r][5], run.sum[r][6], run.sum[r][7]);
      if (w.lane == 0) s.peak[w.warp][r] = run.peak[r], s.total[w.warp][r] = run.total[r];
    }
  }

  // The warps' sums together, two neighbouring features to a thread.
  static __device__ __forceinline__ void store(
      const Worker& w, const Scratch& s, int head, int worker, int first_row, int used) {
    const int pair = w.thread % (dim / 2);
    for (int r = w.thread / (dim / 2); r < used; r += worker_threads / (dim / 2)) {
      float peak = s.peak[0][r], total = 0.f;
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (u32 i = 1; i < worker_warps; ++i) peak = fmaxf(peak, s.peak[i][r]);
#pragma unroll
      for (u32 i = 0; i < worker_warps; ++i) {
        const float factor = relative(s.peak[i][r], peak);
        const float2 part = *reinterpret_cast<const float2*>(&s.sum[i][r][2 * pair]);
        total += s.total[i][r] * factor;
        sum.x += part.x * factor;
        sum.y += part.y * factor;
      }
      const int token = (first_row + r) / group, query = head * group + (first_row + r) % group;
      if constexpr (Shape::splits == 1) {
        *reinterpret_cast<u32*>(Out::at(w, token, query * dim + 2 * pair)) = ptx::pack_bf16(sum.x / total, sum.y / total);
      } else {
        const int row = (worker * Shape::heads + query) * (dim + 2);
        *reinterpret_cast<float2*>(Out::at(w, token, row + 2 * pair)) = sum;
        if (pair == 0) *reinterpret_cast<float2*>(Out::at(w, token, row + dim)) = make_float2(peak, total);
      }
    }
  }
};

}  // namespace mpk
