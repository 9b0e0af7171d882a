// Head norms, RoPE, append and causal attention over one KV head's share of the cache (FlashDecoding, Dao et al. 2023).
//
// Entry: lo = KV head, hi = split worker. Worker w owns the blocks b of positions with b % splits == w: it appends to them and
// nobody else reads them. A block is one page: [K rows | V rows] of one KV head. Blocks come through the ring in pairs, the
// keys of both and then the values. Each warp takes eight neighbouring positions of every block and keeps a running maximum and
// sum of its own; they meet at the end, in order of the warps. Scores come from the tensor cores, queries as rows and positions as columns, and stay in registers as
// operands of the next multiplication: values, features as rows, times weights, queries as columns. A weight is two bf16,
// what rounding leaves over the second: 16 bits of it count. None of it depends on the chunk that a row came in.
//
// Shared memory: the ring (K and V of what is cached); the scratch: queries, new K and V bf16, the warps' sums.
// Registers: at most 168. What does not depend on this step (gains, rotations) is asked for before the event.
#pragma once
#include "tasks/heads.cuh"

namespace mpk {

template <int Heads, int KvHeads, int HeadDim, int Splits, int Block>
struct AttentionShape {
  static constexpr int heads = Heads, kv_heads = KvHeads, dim = HeadDim, splits = Splits, block = Block;
  static constexpr int group = Heads / KvHeads;
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
  static constexpr int dim = Shape::dim, group = Shape::group, block = Shape::block;
  static constexpr CachePages pages{CacheOffset, Shape::kv_heads, block, dim * 2, Shape::splits, group};
  static constexpr int rows = CachePages::rows;  // query rows (of tokens x group) of one pass over the cache
  static_assert(pages.half_bytes() <= plan::slot_bytes, "a block's keys fit a slot of the ring");
  static constexpr int positions = Shape::positions;
  static constexpr int per = dim / static_cast<int>(warp_size);  // features of a lane
  static constexpr int slices = dim / 32;  // of 32 features, 8 to each of the four lanes that share a position's key

  struct Scratch {
    // In every eight features, the pairs 0, 2, 1 and 3: see `scores`. Rows are 64 bytes more than a multiple of 128 apart.
    alignas(16) u16 q[rows][(dim * 2 + 127) / 128 * 64 + 32];
    alignas(16) float sum[worker_warps][rows][dim + 4];  // rows apart by a quarter of the banks; before, see `values_of`
    float peak[worker_warps][rows], total[worker_warps][rows];
    alignas(16) u16 new_key[max_tokens][dim];
    alignas(16) u16 new_value[max_tokens][dim];
  };
  static_assert(sizeof(Scratch) <= scratch_bytes, "attention fits into the scratch");

  // A lane's part of a block's keys: of one position the features 32 i + 8 (lane % 4) and following.
  using Keys = uint4[slices];

  // Softmax of the warp's positions so far: the maximum and (spread over four lanes) the sum of the weights of row lane / 4,
  // and the weighted sums of rows 2 (lane % 4) and the next, of each 16 features number lane / 4 and the eighth after it.
  struct Running {
    float sum[dim / 16][4], peak, total;
  };

  static __device__ void run(Worker& w, const Entry& entry) {
    Scratch& s = *reinterpret_cast<Scratch*>(w.scratch);
    const int head = entry.lo, worker = entry.hi;
    const int queries = w.tokens * group;
    const bool idle = worker * block >= static_cast<int>(w.position + w.tokens);  // none of its blocks exist yet
    for (int row = 0; row < queries; row += rows) {
      const int used = min_of(rows, queries - row);
      Keys keys = {};  // on every path, or its registers would count as in use in other tasks
      turn_vectors(w, s, head, worker, row, used, idle, keys);
      w.sync();
      if (row == 0) w.release_ready();
      if (idle) break;
      w.mark_seen();
      one_pass(w, s, worker, row, used, keys);
      w.sync();
      store(w, s, head, worker, row, used);
      if (row + rows < queries) w.sync();
    }
    if (w.lane == 0) w.shared.mark_waited(w.waits);
    w.signal(entry);
  }

 private:
  // Of this warp's positions in a block how many an earlier step wrote; or more.
  static __device__ __forceinline__ int cached(const Worker& w, int index) {
    return static_cast<int>(w.position) - index * block - static_cast<int>(w.warp) * positions;
  }
  static __device__ __forceinline__ bool in_ring(const Worker& w, int index) { return index * block < static_cast<int>(w.position); }

  // Keys that an earlier step wrote; the others, here zeros, come from this step's own.
  static __device__ __forceinline__ void take_keys(Worker& w, int index, Keys& keys) {
#pragma unroll
    for (int i = 0; i < slices; ++i) keys[i] = make_uint4(0, 0, 0, 0);
    if (!in_ring(w, index)) return;
    w.wait_chunk();
    const u32 n = w.lane / 4;
    const u8* from = w.chunk() + (w.warp * positions + n) * dim * 2;
    const bool mine = static_cast<int>(n) < cached(w, index);
#pragma unroll
    for (int i = 0; i < slices; ++i)
      if (mine) keys[i] = *reinterpret_cast<const uint4*>(from + pages.key_place(n, i * 4 + w.lane % 4) * 16);
    w.free_chunk();
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
  // which go to the cache too. The first pass waits for the event, once all that does not depend on it has been asked for; the
  // pass's first keys are taken before.
  static __device__ __forceinline__ void turn_vectors(
      Worker& w, Scratch& s, int head, int worker, int first_row, int used, bool idle, Keys& keys) {
    const int vectors = idle ? 0 : used + (first_row ? 0 : 2 * w.tokens);
    bool waiting = first_row == 0;
    if (!idle) take_keys(w, worker, keys);
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
        const u32 at = position % block, feature = w.lane * per;
        const u32 place = value ? pages.value_place(at, feature / 8) : pages.key_place(at, feature / 8);
        const i32 page = page_of(w.shared, position / block);
        u8* to = cache_of_head(w.shared, pages, head) + page_offset(w.shared, pages, w.layer, page) +
                 (value ? pages.half_bytes() : 0) + at * dim * 2 + place * 16 + feature % 8 * 2;
        u16* shared = value ? s.new_value[token] : s.new_key[token];
#pragma unroll
        for (int n = 0; n < per; ++n) {
          shared[w.lane * per + n] = bits[n];
          reinterpret_cast<u16*>(to)[n] = bits[n];
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
      Worker& w, Scratch& s, int worker, int first_row, int used, Keys& keys) {
    Running run = {};
    run.peak = -infinity;
    u32 q[slices][4] = {};
    const u32 row = ptx::shared_address(&s.q[w.lane / 4][0]) + w.lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < slices; ++i) ptx::load_shared_16(q[i], row + i * 64, static_cast<int>(w.lane / 4) < used);
    const int sees = w.position + (first_row + static_cast<int>(w.lane / 4)) / group;  // the last position of this lane's row
    const int last = w.position + (first_row + used - 1) / group;
#pragma unroll 1
    for (int index = worker; index * block <= last; index += 2 * Shape::splits) {
      if (index != worker) take_keys(w, index, keys);
      take_new_keys(w, s, index, keys);
      if ((index + Shape::splits) * block <= last)
        add_blocks<2>(w, s, index, sees, q, keys, run);
      else
        add_blocks<1>(w, s, index, sees, q, keys, run);
    }
    leave(w, s, used, run);
  }
  // The block `index`, whose keys have been taken; or the pair that begins with it.
  template <int Blocks>
  static __device__ __forceinline__ void add_blocks(
      Worker& w, Scratch& s, int index, int sees, const u32 (&q)[slices][4], const Keys& keys, Running& run) {
    float score[Blocks][2];
    if constexpr (Blocks == 2) {
      Keys second;
      take_keys(w, index + Shape::splits, second);
      take_new_keys(w, s, index + Shape::splits, second);
      scores(q, second, score[1]);
    }
    scores(q, keys, score[0]);
    weigh(w, index, sees, score, run);
#pragma unroll
    for (int i = 0; i < Blocks; ++i) {
      const int at = index + i * Shape::splits;
      if (in_ring(w, at)) w.wait_chunk();
      const u32 whole = pack_weights(score[i], 0.f, 0.f);
      const u32 rest = pack_weights(score[i], ptx::low_bf16(whole), ptx::high_bf16(whole));
      add_values(w, values_of(w, s, at), whole, rest, run);
      if (in_ring(w, at)) w.free_chunk();
    }
  }
  static __device__ __forceinline__ u32 pack_weights(const float (&x)[2], float less, float less_next) {
    return ptx::pack_bf16(x[0] - less, x[1] - less_next);
  }

  // The place of a position among this step's tokens.
  static __device__ __forceinline__ int fresh(const Worker& w, int index, int n) { return n - cached(w, index); }

  // Keys of this step's own tokens.
  static __device__ __forceinline__ void take_new_keys(const Worker& w, const Scratch& s, int index, Keys& keys) {
    const int token = fresh(w, index, w.lane / 4);
    if (token < 0 || token >= static_cast<int>(w.tokens)) return;
#pragma unroll
    for (int i = 0; i < slices; ++i)
      keys[i] = *reinterpret_cast<const uint4*>(&s.new_key[token][i * 32 + w.lane % 4 * 8]);
  }

  // Where this warp's values of a block lie, as in a page: in the ring, if all are cached; else, with those of this step's own
  // tokens and zeros for those that do not exist, where the warp's sums will go.
  static __device__ __forceinline__ u32 values_of(const Worker& w, Scratch& s, int index) {
    constexpr int pieces = dim / 8;
    const u8* old = w.chunk() + w.warp * positions * dim * 2;
    if (cached(w, index) >= positions) return ptx::shared_address(old);
    uint4* to = reinterpret_cast<uint4*>(s.sum[w.warp]);
    static_assert(sizeof(s.sum[0]) >= positions * dim * 2);
    __syncwarp();  // values before these have been read
#pragma unroll
    for (int i = w.lane; i < positions * pieces; i += warp_size) {
      const int n = i / pieces, token = fresh(w, index, n);
      const u32 place = i % pieces, feature = pages.value_place(n, place) * 8;  // the exchange is its own inverse
      uint4 value = make_uint4(0, 0, 0, 0);
      if (token < 0) value = *reinterpret_cast<const uint4*>(old + i * 16);
      if (token >= 0 && token < static_cast<int>(w.tokens)) value = *reinterpret_cast<const uint4*>(&s.new_value[token][feature]);
      to[i] = value;
    }
    __syncwarp();
    return ptx::shared_address(to);
  }

  // Row lane / 4 times the keys of positions 2 (lane % 4) and the next. A lane's 16 bytes of a key are the columns of two
  // multiplications, and those of a query in the same order: pairs 0 and 1 to the first, 2 and 3 to the second one. The
  // operand's rows 8 to 15, which no query needs, take the other half: the second sum is in their results.
  static __device__ __forceinline__ void scores(
      const u32 (&q)[slices][4], const Keys& keys, float (&score)[2]) {
    float first[4] = {}, second[4] = {};
#pragma unroll
    for (int i = 0; i < slices; ++i) {
      ptx::mma(first, q[i], keys[i].x, keys[i].y);
      ptx::mma(second, q[i], keys[i].z, keys[i].w);
    }
    score[0] = first[0] + second[2];
    score[1] = first[1] + second[3];
  }

  // exp(x - peak), 0 where nothing has been seen.
  static __device__ __forceinline__ float relative(float x, float peak) {
    return peak == -infinity ? 0.f : ptx::exp_fast(x - peak);
  }

  // Scores become weights relative to the warp's new maximum, to which the sums so far are brought too.
  template <int Blocks>
  static __device__ __forceinline__ void weigh(const Worker& w, int index, int sees, float (&score)[Blocks][2], Running& run) {
    float peak = run.peak;
#pragma unroll
    for (int i = 0; i < Blocks; ++i) {
      const int first = (index + i * Shape::splits) * block + w.warp * positions + w.lane % 4 * 2;
      score[i][0] = first <= sees ? score[i][0] * Scale : -infinity;
      score[i][1] = first + 1 <= sees ? score[i][1] * Scale : -infinity;
      peak = fmaxf(peak, fmaxf(score[i][0], score[i][1]));
    }
    peak = fmaxf(peak, __shfl_xor_sync(all_lanes, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(all_lanes, peak, 2));
    const float factor = relative(run.peak, peak);
    run.peak = peak;
    run.total *= factor;
#pragma unroll
    for (int i = 0; i < Blocks; ++i) {
      score[i][0] = relative(score[i][0], peak);
      score[i][1] = relative(score[i][1], peak);
      run.total += score[i][0] + score[i][1];
    }
    const int other = w.lane % 4 * 8;  // a lane that has the factor of this lane's first row of sums
    const float even = __shfl_sync(all_lanes, factor, other), odd = __shfl_sync(all_lanes, factor, other + 4);
#pragma unroll
    for (int m = 0; m < dim / 16; ++m) {
      run.sum[m][0] *= even, run.sum[m][1] *= odd;
      run.sum[m][2] *= even, run.sum[m][3] *= odd;
    }
  }

  // Adds values, features as rows, times weights, queries as columns.
  static __device__ __forceinline__ void add_values(const Worker& w, u32 values, u32 whole, u32 rest, Running& run) {
    const u32 n = w.lane % 8, row = values + n * dim * 2;
#pragma unroll
    for (int i = 0; i < slices; ++i) {
      u32 v[4];
      ptx::load_matrices_transposed(v, row + pages.value_place(n, i * 4 + w.lane / 8) * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::mma_8(run.sum[i * 2 + half], v[half * 2], v[half * 2 + 1], whole);
        ptx::mma_8(run.sum[i * 2 + half], v[half * 2], v[half * 2 + 1], rest);
      }
    }
  }

  static __device__ __forceinline__ void leave(const Worker& w, Scratch& s, int used, const Running& run) {
    float total = run.total + __shfl_xor_sync(all_lanes, run.total, 1);
    total += __shfl_xor_sync(all_lanes, total, 2);
    if (w.lane % 4 == 0) s.peak[w.warp][w.lane / 4] = run.peak, s.total[w.warp][w.lane / 4] = total;
    __syncwarp();  // values that lay here have been read
    const int row = w.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = &s.sum[w.warp][row + i % 2][w.lane / 4 + i / 2 * 8];
#pragma unroll
      for (int m = 0; m < dim / 16; ++m)
        if (row + i % 2 < used) to[m * 16] = run.sum[m][i];
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
