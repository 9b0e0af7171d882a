// Head norms, RoPE, append and causal attention over one KV head's share of the cache (FlashDecoding, Dao et al. 2023).
//
// Entry: lo = KV head, hi = split worker. Worker w owns the blocks b of positions with b % splits == w: it appends to them and
// nobody else reads them. A block is one page: [K rows | V rows] of one KV head. Each warp takes eight neighbouring positions
// of every block and keeps a running maximum and sum of its own; they meet at the end, in order of the warps. Scores come
// from the tensor cores, queries as rows and positions as columns; weights times values are sums of float32, a lane has the
// same features of all positions. None of it depends on the chunk that a row came in.
//
// Shared memory (the scratch): queries, new K and V bf16, weights, the warps' sums. Registers: at most 168. What does not
// depend on this step (K and V of the first block, gains, rotations) is asked for before the event, and each block is brought to
// L2 while the one before it is loaded; further ahead is slower, see benchmarks/decode.md.
#pragma once
#include "tasks/heads.cuh"

namespace mpk {

template <int Heads, int KvHeads, int HeadDim, int Splits, int Block>
struct AttentionShape {
  static constexpr int heads = Heads, kv_heads = KvHeads, dim = HeadDim, splits = Splits, block = Block;
  static constexpr int group = Heads / KvHeads;
  // Query rows (of tokens x group) of one pass over the cache. Their sums lie in registers: fewer where none can be moved.
  static constexpr int rows = group <= 4 || !MPK_MOVES_REGISTERS ? 4 : 8;
  static constexpr int positions = Block / static_cast<int>(worker_warps);  // of a warp in every block
  static_assert(HeadDim == 32 || HeadDim == 64 || HeadDim == 128, "head_dim is 32, 64 or 128");
  static_assert(positions == 8, "a warp's positions are the columns of one multiplication");
  static_assert(Heads % KvHeads == 0, "query heads share KV heads evenly");
};

// The bits of N neighbouring bf16.
template <int N>
struct Bits;
template <>
struct Bits<1> {
  using type = u16;
};
template <>
struct Bits<2> {
  using type = u32;
};
template <>
struct Bits<4> {
  using type = uint2;
};

// Output of one split: [tokens, splits, heads, head_dim + 2] float32, or the finished bf16 value where there is one split.
template <class Shape, class Q, class K, class V, class Norms, class Rotary, u64 CacheOffset, class Out, float Scale>
struct Attention {
  static constexpr int dim = Shape::dim, group = Shape::group, rows = Shape::rows, block = Shape::block;
  static constexpr int page_bytes = 2 * block * dim * 2;
  static constexpr int positions = Shape::positions;
  static constexpr int per = dim / static_cast<int>(warp_size);  // features of a lane
  static constexpr int slices = dim / 32;  // of 32 features, 8 to each of the four lanes that share a position's key

  struct Scratch {
    // In every eight features, the pairs 0, 2, 1 and 3: see `scores`. Rows are 64 bytes more than a multiple of 128 apart.
    alignas(16) u16 q[rows][(dim * 2 + 127) / 128 * 64 + 32];
    alignas(16) float weight[worker_warps][positions][rows];
    alignas(16) float factor[worker_warps][rows];
    alignas(16) float sum[worker_warps][rows][dim];
    float peak[worker_warps][rows], total[worker_warps][rows];
    alignas(16) u16 new_key[max_tokens][dim];
    alignas(16) u16 new_value[max_tokens][dim];
  };
  static_assert(sizeof(Scratch) <= scratch_bytes, "attention fits into the scratch");

  // A lane's part of a block: of one position's key the features 32 i + 8 (lane % 4) and following, of each value its `per`.
  struct Cached {
    uint4 key[slices];
    uint2 value[positions];
  };

  // Softmax of the warp's positions so far: the maximum and (spread over four lanes) the sum of the weights of row lane / 4,
  // and this lane's features of all rows' weighted sums.
  struct Running {
    float sum[rows][per], peak, total;
  };

  static __device__ void run(Worker& w, const Entry& entry) {
    Scratch& s = *reinterpret_cast<Scratch*>(w.scratch);
    const int head = entry.lo, worker = entry.hi;
    const int queries = w.tokens * group;
    const bool idle = worker * block >= static_cast<int>(w.position + w.tokens);  // none of its blocks exist yet
    for (int row = 0; row < queries; row += rows) {
      const int used = min_of(rows, queries - row);
      Cached cached{};  // initialised on every path, or the registers would count as in use in all other tasks too
      if (!idle) {
        prefetch_block(w, head, worker);
        prefetch_block(w, head, worker + Shape::splits);
      }
      turn_vectors(w, s, head, worker, row, used, idle, cached);
      w.sync();
      if (row == 0) w.release_ready();
      if (idle) break;
      w.mark_seen();
      one_pass(w, s, head, worker, row, used, cached);
      w.sync();
      store(w, s, head, worker, row, used);
      if (row + rows < queries) w.sync();
    }
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ u8* page(const Worker& w, int head, int index) {
    const u64 at = static_cast<u64>(w.layer) * w.params.num_pages + w.page(index);
    return w.params.cache + CacheOffset + (at * Shape::kv_heads + head) * page_bytes;
  }

  // Where earlier steps' keys and values are read.
  static __device__ __forceinline__ const u8* cached_page(const Worker& w, int head, int index) {
    const bool wrong = probe::planted(w.params, probe::wrong_page);  // every second page is the one before it
    return page(w, head, wrong ? index & ~1 : index);
  }

  // Positions that an earlier step wrote; the others come from this step's own keys and values.
  static __device__ __forceinline__ void load_block(
      const Worker& w, const u8* from, int first_position, int first_new, Cached& cached) {
    load_keys(w, from, first_position, first_new, cached);
    load_values(w, from, first_position, first_new, cached);
  }
  // What is cached of a block into L2, a line to a lane.
  static __device__ __forceinline__ void prefetch_block(const Worker& w, int head, int index) {
    if (index * block >= static_cast<int>(w.position)) return;
    constexpr u32 lines = positions * dim * 2 / 128;  // of a warp's keys, and of its values
    const u32 line = w.lane % lines, rows = w.warp * positions;
    const int first = index * block + static_cast<int>(rows + line * 128 / (dim * 2));
    const u8* at = cached_page(w, head, index) + (w.lane / lines * block + rows) * dim * 2 + line * 128;
    if (w.lane < 2 * lines && first < static_cast<int>(w.position)) ptx::prefetch_line(at);
  }
  static __device__ __forceinline__ void load_keys(
      const Worker& w, const u8* from, int first_position, int first_new, Cached& cached) {
    const int at = w.warp * positions + w.lane / 4;
    const u8* key = from + at * dim * 2 + w.lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < slices; ++i) {
      cached.key[i] = make_uint4(0, 0, 0, 0);
      if (first_position + at < first_new) cached.key[i] = ptx::load_l2_16(key + i * 64);
    }
  }
  static __device__ __forceinline__ void load_values(
      const Worker& w, const u8* from, int first_position, int first_new, Cached& cached) {
    const int at = w.warp * positions;
    const u8* value = from + (block + at) * dim * 2 + w.lane * per * 2;
#pragma unroll
    for (int i = 0; i < positions; ++i) {
      cached.value[i] = make_uint2(0, 0);
      if (first_position + at + i < first_new) cached.value[i] = load_features(value + i * dim * 2);
    }
  }

  // A lane's `per` neighbouring bf16.
  static __device__ __forceinline__ uint2 load_features(const u8* from) {
    if constexpr (per == 4) return ptx::load_l2_8(from);
    if constexpr (per == 2) return make_uint2(ptx::load_l2_4(from), 0);
    return make_uint2(ptx::load_l2_2(from), 0);
  }
  // A lane's features of what this step computes: Q's, K's and V's cross in the same way.
  using Fresh = typename Bits<per>::type;
  static __device__ __forceinline__ uint2 pairs_of(uint2 v) { return v; }
  static __device__ __forceinline__ uint2 pairs_of(u32 v) { return make_uint2(v, 0); }
  static __device__ __forceinline__ void widen(uint2 v, float (&to)[per]) {
    to[0] = ptx::low_bf16(v.x);
    if constexpr (per > 1) to[1] = ptx::high_bf16(v.x);
    if constexpr (per > 2) to[2] = ptx::low_bf16(v.y), to[3] = ptx::high_bf16(v.y);
  }

  // --- this step's queries, keys and values, a vector to a warp

  // The pass's queries go to shared memory; in the first pass also new keys and values of the blocks that this worker owns,
  // which go to the cache too. The first pass waits for the event, once all that does not depend on it has been asked for: the
  // first block of what is cached, too, unless the task is idle.
  static __device__ __forceinline__ void turn_vectors(
      Worker& w, Scratch& s, int head, int worker, int first_row, int used, bool idle, Cached& cached) {
    const int vectors = idle ? 0 : used + (first_row ? 0 : 2 * w.tokens);
    bool waiting = first_row == 0, asked = idle;
    for (int i = w.warp; waiting || i < vectors || !asked; i += worker_warps) {
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
      if (!asked) load_block(w, cached_page(w, head, worker), worker * block, w.position, cached);
      asked = true;
      if (waiting) {
        w.wait_ready();
        waiting = false;
      }
      const u8* from = query ? Q::at(w, token, (head * group + row % group) * dim)
                             : (value ? V::at(w, token, head * dim) : K::at(w, token, head * dim));
      Fresh fresh{};
      if (!mine) continue;
      Q::look(from + w.lane * per * 2, fresh);
      Q::settle(w, from + w.lane * per * 2, fresh);
      float x[per];
      widen(pairs_of(fresh), x);
      if (!value) {
        Norms::apply(gain, x);
        Rotary::apply(w, angle, x);
      }
      u16 bits[per];
#pragma unroll
      for (int n = 0; n < per; ++n) bits[n] = ptx::round_bf16(x[n]);
      if (query) {
#pragma unroll
        for (int n = 0; n < per; ++n) s.q[i][shuffled(w.lane * per + n)] = bits[n];
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

  // Where a query's feature lies: pairs 1 and 2 of every eight change places.
  static __device__ __forceinline__ int shuffled(int feature) {
    const int pair = feature / 2 % 4;
    return feature / 8 * 8 + (pair % 2 * 2 + pair / 2) * 2 + feature % 2;
  }

  // --- scores, softmax and sum

  static __device__ __forceinline__ void one_pass(
      const Worker& w, Scratch& s, int head, int worker, int first_row, int used, Cached& cached) {
    Running run;
    run.peak = -infinity, run.total = 0.f;
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int i = 0; i < per; ++i) run.sum[r][i] = 0.f;
    u32 q[slices][4] = {};
    const u32 row = ptx::shared_address(&s.q[min_of<int>(w.lane / 4, rows - 1)][0]) + w.lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < slices; ++i) ptx::load_shared_16(q[i], row + i * 64, static_cast<int>(w.lane / 4) < used);
    const int sees = w.position + (first_row + static_cast<int>(w.lane / 4)) / group;  // the last position of this lane's row
    const int last = w.position + (first_row + used - 1) / group;
    for (int index = worker; index * block <= last; index += Shape::splits) {
      take_new(w, s, index, cached);
      float score[2];
      scores(q, cached, score);
      const int next = index + Shape::splits;
      const bool more = next * block <= last;
      const u8* from = more ? cached_page(w, head, next) : nullptr;
      if (more) load_keys(w, from, next * block, w.position, cached);
      weigh(w, s, index, sees, score, run);
      add_values(w, s, used, cached, run);
      if (more) load_values(w, from, next * block, w.position, cached);
      prefetch_block(w, head, index + 2 * Shape::splits);
    }
    leave(w, s, used, run);
  }

  // Keys and values of this step's own tokens.
  static __device__ __forceinline__ void take_new(const Worker& w, const Scratch& s, int index, Cached& cached) {
    const int fresh = index * block + static_cast<int>(w.warp) * positions - static_cast<int>(w.position);  // the first one's
    if (fresh + positions <= 0) return;
    const int tokens = w.tokens, mine = fresh + static_cast<int>(w.lane / 4);
    if (mine >= 0 && mine < tokens) {
#pragma unroll
      for (int i = 0; i < slices; ++i)
        cached.key[i] = *reinterpret_cast<const uint4*>(&s.new_key[mine][i * 32 + w.lane % 4 * 8]);
    }
#pragma unroll
    for (int i = 0; i < positions; ++i) {
      if (fresh + i < 0 || fresh + i >= tokens) continue;
      const u16* from = &s.new_value[fresh + i][w.lane * per];
      if constexpr (per == 4) cached.value[i] = *reinterpret_cast<const uint2*>(from);
      if constexpr (per == 2) cached.value[i].x = *reinterpret_cast<const u32*>(from);
      if constexpr (per == 1) cached.value[i].x = *from;
    }
  }

  // Row lane / 4 times the keys of positions 2 (lane % 4) and the next. A lane's 16 bytes of a key are the columns of two
  // multiplications, and those of a query in the same order: pairs 0 and 1 to the first, 2 and 3 to the second one. The
  // operand's rows 8 to 15, which no query needs, take the other half: the second sum is in their results.
  static __device__ __forceinline__ void scores(
      const u32 (&q)[slices][4], const Cached& cached, float (&score)[2]) {
    float first[4] = {}, second[4] = {};
#pragma unroll
    for (int i = 0; i < slices; ++i) {
      ptx::mma(first, q[i], cached.key[i].x, cached.key[i].y);
      ptx::mma(second, q[i], cached.key[i].z, cached.key[i].w);
    }
    score[0] = first[0] + second[2];
    score[1] = first[1] + second[3];
  }

  // exp(x - peak), 0 where nothing has been seen.
  static __device__ __forceinline__ float relative(float x, float peak) {
    return peak == -infinity ? 0.f : ptx::exp_fast(x - peak);
  }

  // Scores become weights relative to the warp's new maximum. They and the factors of the sums so far go to shared memory.
  static __device__ __forceinline__ void weigh(
      const Worker& w, Scratch& s, int index, int sees, const float (&score)[2], Running& run) {
    const int at = w.lane % 4 * 2, first = index * block + w.warp * positions + at, row = w.lane / 4;
    const float a = first <= sees ? score[0] * Scale : -infinity, b = first + 1 <= sees ? score[1] * Scale : -infinity;
    float peak = fmaxf(run.peak, fmaxf(a, b));
    peak = fmaxf(peak, __shfl_xor_sync(all_lanes, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(all_lanes, peak, 2));
    const float factor = relative(run.peak, peak), x = relative(a, peak), y = relative(b, peak);
    run.peak = peak;
    run.total = run.total * factor + (x + y);
    __syncwarp();  // the weights before these have been read
    if (row < rows) {
      s.weight[w.warp][at][row] = x;
      s.weight[w.warp][at + 1][row] = y;
      if (at == 0) s.factor[w.warp][row] = factor;
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void add_values(
      const Worker& w, const Scratch& s, int used, const Cached& cached, Running& run) {
    float weight[rows];
    of_rows(s.factor[w.warp], weight);
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int i = 0; i < per; ++i)
        if (r < used) run.sum[r][i] *= weight[r];
#pragma unroll
    for (int n = 0; n < positions; ++n) {
      float value[per];
      widen(cached.value[n], value);
      of_rows(s.weight[w.warp][n], weight);
#pragma unroll
      for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int i = 0; i < per; ++i)
          if (r < used) run.sum[r][i] = fmaf(weight[r], value[i], run.sum[r][i]);
    }
  }
  static __device__ __forceinline__ void of_rows(const float (&from)[rows], float (&to)[rows]) {
#pragma unroll
    for (int r = 0; r < rows; r += 4) {
      const float4 v = *reinterpret_cast<const float4*>(&from[r]);
      to[r] = v.x, to[r + 1] = v.y, to[r + 2] = v.z, to[r + 3] = v.w;
    }
  }

  static __device__ __forceinline__ void leave(const Worker& w, Scratch& s, int used, const Running& run) {
    float total = run.total + __shfl_xor_sync(all_lanes, run.total, 1);
    total += __shfl_xor_sync(all_lanes, total, 2);
    if (w.lane % 4 == 0 && w.lane / 4 < rows) s.peak[w.warp][w.lane / 4] = run.peak, s.total[w.warp][w.lane / 4] = total;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (r >= used) continue;
#pragma unroll
      for (int i = 0; i < per; ++i) s.sum[w.warp][r][w.lane * per + i] = run.sum[r][i];
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
        Out::put(w, token, query * dim + 2 * pair, ptx::pack_bf16(sum.x / total, sum.y / total));
      } else {
        const int row = (worker * Shape::heads + query) * (dim + 2);
        Out::put(w, token, row + 2 * pair, bits_of(sum));
        if (pair == 0) Out::put(w, token, row + dim, bits_of(make_float2(peak, total)));
      }
    }
  }
};

}  // namespace mpk
