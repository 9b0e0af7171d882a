// Matrix product with a packed weight: [tokens, K] x [rows, K]^T for 1-16 tokens, on the tensor cores.
//
// Shared memory: the ring (weights), activations 33 KB, partial sums 12 KB. Registers: at most 216 where warpgroups move them, else 168.
//
// A weight tile is 8 rows, the last one of a task perhaps less, stored as chunks of `tile_k` columns, row by row. Of a tile's
// row r the 16 bytes number p lie in place p ^ (r & mix), so that ldmatrix, which reads one piece of each of eight rows, finds
// them in different banks. What it reads of rows that a tile does not have is of no result. The 8 warps share each chunk by blocks
// of 32 columns. Several tokens are the 16 rows of mma.m16n8k16 and weight rows its 8 columns; of one token it is the other way round, see `run_one`. Order of
// summation of a result, the same bits either way: two chains, of the first and of the second 16 columns of the blocks
// b, b + 8, ... of every chunk, chunks in order; their sum; then the 8 warps in pairs, pairs of pairs and so on. It does
// not depend on the number of tokens.
//
// One token has a path of its own with little code, which keeps the sums of a block's tiles in shared memory: at so few
// instructions per byte, what counts is how many there are, and that a layer's tasks fit the instruction cache.
#pragma once
#include "tasks/tensor.cuh"

namespace mpk {

// The shape of a packed weight. MostTiles: of a task.
template <int K, int Rows, int TileK, int MostTiles>
struct Tiles {
  static constexpr int k = K, rows = Rows, tile_k = TileK;
  static constexpr int chunks = ceil_div(K, TileK);
  static constexpr int blocks_per_warp = ceil_div(TileK / 32, worker_warps);
  static constexpr bool one_pair = MostTiles <= 2;
  static constexpr u32 mix = K % 64 == 0 && TileK % 64 == 0 ? 7 : 3;
  static constexpr bool even = K % TileK == 0 && TileK % (32 * worker_warps) == 0;  // every warp has as many blocks
  static_assert(K % 32 == 0 && TileK % 32 == 0, "columns come in blocks of 32");
  static_assert(tile_rows * TileK * 2 <= plan::slot_bytes, "a chunk fits a slot of the ring");
  static_assert(max_tokens * ((TileK * 2 + 127) / 128 * 128 + 64) <= activation_bytes, "a chunk's activations fit for all tokens");

  // Bytes from row to row in a chunk.
  static __device__ __forceinline__ u32 row_bytes(int chunk) { return (K % TileK == 0 ? TileK : min_of(TileK, K - chunk * TileK)) * 2; }
  // Where, from a chunk's begin, the 16 bytes lie that a lane gives ldmatrix the address of: of the tile's row lane % 8 piece number
  // `piece` of the warp's first block.
  static __device__ __forceinline__ u32 place(const Worker& w, int chunk, u32 piece) {
    return w.lane % 8 * row_bytes(chunk) + ((w.warp * 4 + piece) ^ (w.lane & mix)) * 16;
  }

  // Whether block `j` of a warp exists in a chunk.
  static __device__ __forceinline__ bool has_block(const Worker& w, int chunk, int j) {
    if (K % TileK == 0 && j < TileK / (32 * static_cast<int>(worker_warps))) return true;
    const int blocks = K % TileK == 0 ? TileK / 32 : min_of(TileK, K - chunk * TileK) / 32;
    return static_cast<int>(w.warp + j * worker_warps) < blocks;
  }
};

// The columns [lo, hi) of the activations, bf16, in shared memory: for each token, blocks of 32 columns of 64 bytes.
//
// In a block, lane q of the four that hold a token's operand of the tensor cores finds its 16 bytes at q * 16: columns
// 2q, 2q + 1 of each group of eight. Rows are 64 bytes more than a multiple of 128 apart, so that two do not share banks.
struct Panel {
  int lo, hi;

  static constexpr __host__ __device__ __forceinline__ u32 row_bytes(int columns) { return (columns * 2 + 127) / 128 * 128 + 64; }
  __device__ __forceinline__ u32 row_bytes() const { return row_bytes(hi - lo); }
  // Whether a token's whole row fits where activations go.
  static constexpr __host__ __device__ __forceinline__ bool fits_one_token(int columns) {
    return row_bytes(columns) <= activation_bytes;
  }

  // Where the word with columns `feature`, `feature + 1` (even) of a token goes.
  __device__ __forceinline__ u32* at(const Worker& w, u32 token, int feature) const {
    const u32 column = feature - lo;
    const u32 word = column / 32 * 16 + column % 8 / 2 * 4 + column % 32 / 8;
    return reinterpret_cast<u32*>(w.activations() + token * row_bytes()) + word;
  }
  // Four neighbouring columns, the first a multiple of four.
  __device__ __forceinline__ void store_four(const Worker& w, u32 token, int feature, uint2 pairs) const {
    u32* to = at(w, token, feature);
    to[0] = pairs.x;
    to[4] = pairs.y;
  }
};

// Tiles whose partial sums lie in shared memory: [warp][tile][token][8 rows], a warp's of one token always as far apart as those
// of a whole block are. Results are numbered by tile, token and row; number `i` belongs to thread i % 256. first: the first row;
// end: where the task's rows end, perhaps within the last tile.
struct Block {
  int first, tiles, end;

  // The block that begins at row `first` of a task's.
  static __device__ __forceinline__ Block at(int first, int end) { return {first, min_of(tiles_per_block, tiles_of(end - first)), end}; }

  struct Place {
    int tile, row;  // the tile in the block
    u32 token;
  };
  template <int per_tile>
  static __device__ __forceinline__ Place place(u32 index, u32 tokens) {
    const u32 rest = index / per_tile;
    if (tokens == 1) return {static_cast<int>(rest), static_cast<int>(index % per_tile), 0};
    return {static_cast<int>(rest / tokens), static_cast<int>(index % per_tile), rest % tokens};
  }
  // Calls `result` with the number of each of this thread's results: with that of the thread alone where there is one token.
  template <int per_tile, class Result>
  __device__ __forceinline__ void each(const Worker& w, Result result) const {
    static_assert(tiles_per_block * per_tile <= static_cast<int>(worker_threads));
    const u32 count = tiles * per_tile * w.tokens;
    if (w.tokens == 1) {
      if (w.thread < count) result(w.thread);
      return;
    }
#pragma unroll 1
    for (u32 i = w.thread; i < count; i += worker_threads) result(i);
  }
  __device__ __forceinline__ float sum(const Worker& w, int tile, int row, u32 token) const {
    const u32 stride = w.tokens == 1 ? block_rows : tiles * w.tokens * tile_rows;
    const float* at = w.partials() + (tile * w.tokens + token) * tile_rows + row;
    float part[worker_warps];
#pragma unroll
    for (u32 i = 0; i < worker_warps; ++i) part[i] = at[i * stride];
    return sum_in_pairs(part);
  }
};

// What of a linear's results peers get: see tasks/inbox.cuh.
template <class Epilogue>
struct ForPeers {
  static __device__ __forceinline__ Outgoing of(const Worker&, const Entry&) { return {}; }
};

// What an epilogue keeps from block to block of a task of one token, and what it does at a task's end: mostly nothing, see
// tasks/argmax.cuh.
template <class Epilogue>
struct Ending {
  struct Kept {};
  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const typename Epilogue::Early& early, Kept&) {
    Epilogue::finish(w, block, early);
  }
  static __device__ __forceinline__ void one(const Worker&, const Entry&, const Kept&) {}
  static __device__ __forceinline__ void many(const Worker&, const Entry&) {}
};

template <class Shape, class Prologue, class Epilogue>
struct Linear {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    if (w.tokens == 1)
      run_one(w, entry);
    else
      static_cast<Progress&>(w) = run_many(w, entry);
    w.release_ready();
    w.signal(entry, ForPeers<Epilogue>::of(w, entry));
  }

 private:
  static constexpr int per_warp = Shape::blocks_per_warp;
  static constexpr u32 block_bytes = worker_warps * 64;  // of a row, from one of a warp's blocks to the next

  // Chunks whose activations fit at once.
  static __device__ __forceinline__ int panel_chunks_of(u32 tokens) {
    if (tokens * Panel::row_bytes(Shape::k) <= activation_bytes) return Shape::chunks;
    return max_of<int>(1, (activation_bytes / tokens - 64) / 128 * 128 / (Shape::tile_k * 2));
  }

  static __device__ __forceinline__ Panel panel_from(int chunk, int panel_chunks) {
    return {chunk * Shape::tile_k, min_of((chunk + panel_chunks) * Shape::tile_k, Shape::k)};
  }

  // A chunk's columns take the place of others, together with those of the chunks that follow.
  static __device__ __forceinline__ void next_panel(const Worker& w, Panel& panel, int chunk, int panel_chunks) {
    if (chunk * Shape::tile_k >= panel.lo && chunk * Shape::tile_k < panel.hi) return;
    panel = panel_from(chunk, panel_chunks);
    w.sync();
    Prologue::fill(w, panel);
    w.sync();
    w.mark_seen();
  }

  // This lane's first 16 bytes of the activations of a token in a chunk.
  static __device__ __forceinline__ u32 operand(const Worker& w, const Panel& panel, int chunk, u32 token) {
    return ptx::shared_address(w.activations()) + token * panel.row_bytes() + (chunk * Shape::tile_k - panel.lo) * 2 +
           w.warp * 64 + w.lane % 4 * 16;
  }

  // This warp's part of a chunk of weights.
  struct Weights {
    u32 b[per_warp][4];

    __device__ __forceinline__ void load(Worker& w, int chunk) {
      const u32 from = w.wait_chunk() + Shape::place(w, chunk, w.lane / 8);
#pragma unroll
      for (int j = 0; j < per_warp; ++j) {
        if (!Shape::even) b[j][0] = b[j][1] = b[j][2] = b[j][3] = 0;
        if (Shape::has_block(w, chunk, j)) ptx::load_matrices(b[j], from + j * block_bytes);
      }
      w.free_chunk();
    }
  };

  // --- one token
  //
  // The weights are the first operand, two tiles its 16 rows, and the token is one of the second one's eight columns. So the
  // results of tile t are in lanes 0, 4, ..., 28, one row in each, and those of tile t + 1 beside them.

  // This warp's part of a chunk of each of two tiles, or twice of one: of its blocks the first and the second 16 columns.
  struct Pair {
    u32 even[per_warp][4], odd[per_warp][4];

    // Of `count` chunks that have landed.
    __device__ __forceinline__ void load(Worker& w, int chunk, int count) {
      const LaneChunk at = w.chunk_of_lane(count);
      const u32 from = address(w, at, chunk);
#pragma unroll
      for (int j = 0; j < per_warp; ++j) load_block(w, chunk, j, from);
      w.free_chunks(at, count);
    }
    // Block `j` of each, the first of which this lane has a row of at `from`.
    __device__ __forceinline__ void load_block(const Worker& w, int chunk, int j, u32 from) {
      if (!Shape::has_block(w, chunk, j)) return;
      ptx::load_matrices(even[j], from + j * block_bytes);
      ptx::load_matrices(odd[j], (from ^ 32) + j * block_bytes);  // two pieces further, also of those that are mixed
    }
    static __device__ __forceinline__ u32 address(const Worker& w, LaneChunk at, int chunk) {
      return w.chunk_address(at) + Shape::place(w, chunk, w.lane / 16);
    }
  };

  // A lane's sums of a pair: a row of tile t in the first of four, of tile t + 1 in the third one; the others are of no token.
  struct alignas(16) Chain {
    float of[4];
  };

  // The pair that follows; `count` 0: the task ends before.
  struct Following {
    int chunk, count;
  };

  // Weights that were taken out of the ring ahead: the pair that comes next and perhaps the one after it.
  struct Held {
    Pair pair{}, second{};
    int pairs = 0;

    // Of a task's first block, before its values are waited for: meanwhile the ring has room for as many more, and late tasks would
    // have to wait for these anyway. Nothing where registers are short.
    __device__ __forceinline__ void take(Worker& w, int tiles) {
      if (!MPK_MOVES_REGISTERS) return;
      const int count = min_of(2, tiles);
      w.wait_chunks(w.chunk_of_lane(count));
      pair.load(w, 0, count);
      pairs = 1;
      if (Shape::one_pair) return;
      const Following next = following(0, 0, tiles, 0);
      if (next.count == 0) return;
      w.wait_chunks(w.chunk_of_lane(next.count));
      second.load(w, next.chunk, next.count);
      pairs = 2;
    }
  };

  static __device__ __forceinline__ void run_one(Worker& w, const Entry& entry) {
    const int lo = entry.lo, hi = entry.hi;  // once, not again after every barrier
    Panel panel = panel_from(0, panel_chunks_of(1));
    Block block = Block::at(lo, hi);
    Held held;
    held.take(w, block.tiles);
    typename Epilogue::Early early{};  // on every path, or its registers would count as in use in other tasks
    Epilogue::load_early(w, block, early);
    if (!Prologue::prepare(w, entry, panel)) Prologue::fill(w, panel);
    w.sync();
    w.mark_seen();
    w.waits = {};  // for weights before the values count as the wait for these
    typename Ending<Epilogue>::Kept kept{};
    while (true) {
      if constexpr (Shape::one_pair)
        one_pair(w, block.tiles, panel, held);
      else
        one_token(w, block.tiles, tiles_of(hi - block.first) - block.tiles, panel, held);
      w.sync();
      Ending<Epilogue>::finish(w, block, early, kept);
      if (Shape::one_pair || block.first + block_rows >= hi) break;
      block = Block::at(block.first + block_rows, hi);
      w.sync();
      Epilogue::load_early(w, block, early);
    }
    Ending<Epilogue>::one(w, entry, kept);
    if (w.lane == 0) w.shared.mark_waited(w.waits);
  }

  // A task of one or two tiles: the chains stay in registers.
  static __device__ __forceinline__ void one_pair(Worker& w, int tiles, Panel& panel, Held& held) {
    Pair& pair = held.pair;
    bool loaded = held.pairs != 0;
    Chain even{}, odd{};
    u32 a[per_warp][4] = {};
#pragma unroll (Shape::chunks <= 4 ? Shape::chunks : 1)
    for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
      if constexpr (!Panel::fits_one_token(Shape::k)) next_panel(w, panel, chunk, panel_chunks_of(1));
      load_activations(w, panel, chunk, a);
      if (w.thread == 0) w.shared.mark_opened();
      if (!loaded) {
        w.wait_chunks(w.chunk_of_lane(tiles));
        pair.load(w, chunk, tiles);
      }
      const bool looks = MPK_MOVES_REGISTERS && chunk + 1 < Shape::chunks;
      loaded = multiply(w, chunk, a, pair, even, odd, looks ? Following{chunk + 1, tiles} : Following{0, 0});
      if (w.thread == 0) w.shared.mark_used();
    }
    store_partials(w, even, odd, tiles, partials_of_lane(w));
  }

  // This warp's first partial sum of a block, of the row that this lane has.
  static __device__ __forceinline__ float* partials_of_lane(const Worker& w) {
    return w.partials() + w.warp * block_rows + w.lane / 4;
  }
  static __device__ __forceinline__ void store_partials(
      const Worker& w, const Chain& even, const Chain& odd, int count, float* partial) {
    if (w.lane % 4) return;
    partial[0] = even.of[0] + odd.of[0];
    if (count == 2) partial[tile_rows] = even.of[2] + odd.of[2];
  }
  static __device__ __forceinline__ void load_activations(const Worker& w, const Panel& panel, int chunk, u32 (&a)[per_warp][4]) {
    const u32 row = operand(w, panel, chunk, 0);
#pragma unroll
    for (int j = 0; j < per_warp; ++j)
      ptx::load_shared_16(a[j], row + j * worker_warps * 64, w.lane < 4 && Shape::has_block(w, chunk, j));
  }

  // In the end `held` has what has landed of the block that follows, of `rest` tiles with all that come after. Between chunks the
  // chains lie behind the partial sums.
  static __device__ __forceinline__ void one_token(Worker& w, int tiles, int rest, Panel& panel, Held& held) {
    float* partial = partials_of_lane(w);
    Chain* chains = reinterpret_cast<Chain*>(w.partials() + worker_warps * block_rows) + w.warp * tiles_per_block * 8 + w.lane / 4;
    static_assert(worker_warps * (block_rows * 4 + tiles_per_block * 8 * sizeof(Chain)) <= partial_bytes);
    u32 a[per_warp][4] = {};  // lanes of absent tokens keep zeros
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
      if constexpr (!Panel::fits_one_token(Shape::k)) next_panel(w, panel, chunk, panel_chunks_of(1));
      load_activations(w, panel, chunk, a);
#pragma unroll 1
      for (int t = 0; t < tiles; t += 2) {
        const int count = min_of(2, tiles - t);
        if (w.thread == 0) w.shared.mark_opened();
        if (held.pairs == 0) {
          w.wait_chunks(w.chunk_of_lane(count));
          held.pair.load(w, chunk, count);
        }
        const bool both = held.pairs == 2;
        const Following next = both ? Following{0, 0} : following(chunk, t, tiles, rest);
        held.pairs = add_one_token(w, chunk, a, held.pair, count, chains + t * 8, partial + t * tile_rows, next);
        if (both) held.pair = held.second, held.pairs = 1;
        if (w.thread == 0) w.shared.mark_used();
      }
    }
  }

  // What comes after the pair of tiles `t` and t + 1 of a chunk. Not looked at where registers are short.
  static __device__ __forceinline__ Following following(int chunk, int t, int tiles, int rest) {
    if (!MPK_MOVES_REGISTERS) return {0, 0};
    if (t + 2 < tiles) return {chunk, min_of(2, tiles - t - 2)};
    if (chunk + 1 < Shape::chunks) return {chunk + 1, min_of(2, tiles)};
    return {0, min_of(2, rest)};
  }

  // Of a pair's second tile only where `count` is 2 is there anything to keep. Returns what `multiply` does.
  static __device__ __forceinline__ bool add_one_token(
      Worker& w, int chunk, const u32 (&a)[per_warp][4], Pair& pair, int count, Chain* chains, float* partial, Following next) {
    Chain even{}, odd{};
    if (Shape::chunks > 1 && chunk && w.lane % 4 == 0) even = chains[0], odd = chains[8];
    const bool landed = multiply(w, chunk, a, pair, even, odd, next);
    if (chunk + 1 == Shape::chunks)
      store_partials(w, even, odd, count, partial);
    else if (w.lane % 4 == 0)
      chains[0] = even, chains[8] = odd;
    return landed;
  }

  // Adds a pair of chunks. The weights of the pair that follows, if they have landed, are loaded as soon as this one's have been
  // used; returns whether they were.
  static __device__ __forceinline__ bool multiply(
      Worker& w, int chunk, const u32 (&a)[per_warp][4], Pair& pair, Chain& even, Chain& odd, Following next) {
    const LaneChunk at = w.chunk_of_lane(next.count);
    bool landed = next.count > 0 && w.sees_landed(at);
    const u32 from = Pair::address(w, at, next.chunk);
#pragma unroll
    for (int j = 0; j < per_warp; ++j) {
      if (Shape::has_block(w, chunk, j)) {
        ptx::mma(even.of, pair.even[j], a[j][0], a[j][1]);
        ptx::mma(odd.of, pair.odd[j], a[j][2], a[j][3]);
      }
      if (j == 0) landed = __all_sync(all_lanes, landed);
      if (landed) pair.load_block(w, next.chunk, j, from);
    }
    if (landed) w.free_chunks(at, next.count);
    return landed;
  }

  // --- several tokens: a block's sums stay in registers while its activations pass by
  //
  // A function of its own: seldom run, it neither lies between the instructions of one token's steps nor takes part in how
  // the compiler shares out their registers, and takes it half as long.

  static __device__ __noinline__ Progress run_many(Progress progress, const Entry& entry) {
    Worker w(progress, ptx::thread_in_block<~0u>());
    __builtin_assume(w.tokens > 1);
    w.group = entry.group;
    const int panel_chunks = panel_chunks_of(w.tokens);
    Panel panel{0, 0};
    Prologue::prepare(w, entry, panel);
#pragma unroll 1
    for (int row = entry.lo; row < entry.hi; row += block_rows) {
      float sums[tiles_per_block][2][4] = {};
      const Block block = Block::at(row, entry.hi);
#pragma unroll 1
      for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
        next_panel(w, panel, chunk, panel_chunks);
        multiply_chunks(w, sums, block.tiles, chunk, panel);
      }
      finish_many(w, block, sums);
      if (row + block_rows < entry.hi) w.sync();
    }
    Ending<Epilogue>::many(w, entry);
    if (w.lane == 0) w.shared.mark_waited(w.waits);
    return w;
  }

  static __device__ __forceinline__ void finish_many(
      const Worker& w, const Block& block, const float (&sums)[tiles_per_block][2][4]) {
    const int per_round = min_of<int>(tiles_per_block, partial_bytes / (worker_warps * tile_rows * 4 * w.tokens));
#pragma unroll 1
    for (int first = 0; first < block.tiles; first += per_round) {
      const Block part{block.first + first * tile_rows, min_of(per_round, block.tiles - first), block.end};
      typename Epilogue::Early early{};
      Epilogue::load_early(w, part, early);
      if (first) w.sync();
      store_partials(w, sums, first, part.tiles);
      w.sync();
      Epilogue::finish(w, part, early);
    }
  }

  // One chunk of each tile of the block. The tiles take turns in the first place of `sums`, so that there is code for one.
  static __device__ __forceinline__ void multiply_chunks(
      Worker& w, float (&sums)[tiles_per_block][2][4], int tiles, int chunk, const Panel& panel) {
    const u32 token = w.lane / 4;
    const u32 low = operand(w, panel, chunk, token), high = low + 8 * panel.row_bytes();
    u32 a[per_warp][2][4] = {};
#pragma unroll
    for (int j = 0; j < per_warp; ++j) {
      const bool mine = Shape::has_block(w, chunk, j);
      ptx::load_shared_16(a[j][0], low + j * worker_warps * 64, mine && token < w.tokens);
      ptx::load_shared_16(a[j][1], high + j * worker_warps * 64, mine && token + 8 < w.tokens);
    }
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      Weights weights;
      weights.load(w, chunk);
#pragma unroll
      for (int j = 0; j < per_warp; ++j) {
        if (!Shape::has_block(w, chunk, j)) continue;
        const u32(&lo)[4] = a[j][0], (&hi)[4] = a[j][1];
        const u32 first[4] = {lo[0], hi[0], lo[1], hi[1]}, second[4] = {lo[2], hi[2], lo[3], hi[3]};
        ptx::mma(sums[0][0], first, weights.b[j][0], weights.b[j][1]);
        ptx::mma(sums[0][1], second, weights.b[j][2], weights.b[j][3]);
      }
      take_turns(sums, tiles);
    }
  }

  // The first of `count` goes last.
  static __device__ __forceinline__ void take_turns(float (&sums)[tiles_per_block][2][4], int count) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float first = sums[0][i / 4][i % 4];
#pragma unroll
      for (int t = 0; t + 1 < tiles_per_block; ++t)
        sums[t][i / 4][i % 4] = t + 1 < count ? sums[t + 1][i / 4][i % 4] : first;
      if (count == tiles_per_block) sums[tiles_per_block - 1][i / 4][i % 4] = first;
    }
  }

  static __device__ __forceinline__ void store_partials(
      const Worker& w, const float (&sums)[tiles_per_block][2][4], int first, int count) {
    const u32 token = w.lane / 4, row = w.lane % 4 * 2;
    float* to = w.partials() + (w.warp * count * w.tokens + token) * tile_rows + row;
#pragma unroll
    for (int t = 0; t < tiles_per_block; ++t) {
      if (t < first || t >= first + count) continue;
      const auto& s = sums[t];
      float* at = to + (t - first) * w.tokens * tile_rows;
      if (token < w.tokens) *reinterpret_cast<float2*>(at) = make_float2(s[0][0] + s[1][0], s[0][1] + s[1][1]);
      if (token + 8 < w.tokens)
        *reinterpret_cast<float2*>(at + 8 * tile_rows) = make_float2(s[0][2] + s[1][2], s[0][3] + s[1][3]);
    }
  }
};

// One linear of a concatenated weight: `Rows` of its rows in each of the packing's groups.
template <class Out, int Rows, class Bias>
struct Part {
  using out = Out;
  using bias = Bias;
  static constexpr int rows = Rows;
};

// Epilogue: stores rows of several linears, packed one after the other in each of `groups` groups (the KV heads, say).
template <int Groups, class... Parts>
struct Store {
  static constexpr int group_rows = (Parts::rows + ...);
  struct Early {};

  static __device__ __forceinline__ void load_early(const Worker&, const Block&, Early&) {}

  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const Early&) {
    block.each<tile_rows>(w, [&](u32 i) {
      const auto at = Block::place<tile_rows>(i, w.tokens);
      const float value = block.sum(w, at.tile, at.row, at.token);
      const int row = block.first + at.tile * tile_rows + at.row;
      if (row < block.end) put<0, Parts...>(w, at.token, row / group_rows, row % group_rows, value);
    });
  }

 private:
  template <int Before, class First, class... Rest>
  static __device__ __forceinline__ void put(const Worker& w, int token, int group, int row, float value) {
    if (row < Before + First::rows) {
      const int feature = group * First::rows + row - Before;
      First::out::store(w, token, feature, value + First::bias::load(w, feature));
      return;
    }
    if constexpr (sizeof...(Rest) > 0) put<Before + First::rows, Rest...>(w, token, group, row, value);
  }
};

}  // namespace mpk
