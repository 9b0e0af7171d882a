// Matrix product with a packed weight: [tokens, K] x [rows, K]^T for 1-16 tokens, on the tensor cores.
//
// Shared memory: the ring (weights), activations 33 KB, partial sums 16 KB. Registers: at most 168.
//
// A weight tile is 8 rows, stored as chunks of `tile_k` columns, each chunk as [tile_k / 32][4][8][8]: core matrices that
// ldmatrix (and wgmma without swizzle) reads. The 8 warps share each chunk by blocks of 32 columns. Tokens are the 16 rows
// of mma.m16n8k16, weight rows its 8 columns, so 16 tokens cost what one costs.
// Order of summation of a result: two chains, of the first and of the second 16 columns of the blocks b, b + 8, ... of
// every chunk, chunks in order; their sum; then the 8 warps in order. It does not depend on the number of tokens.
//
// One token has a path of its own, with little code and the sums of other tiles in shared memory: a layer's tasks must fit
// the instruction cache, or fetching them costs more than the arithmetic.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// The shape of a packed weight.
template <int K, int Rows, int TileK>
struct Tiles {
  static constexpr int k = K, rows = Rows, tile_k = TileK;
  static constexpr int chunks = ceil_div(K, TileK);
  static constexpr int blocks_per_warp = ceil_div(TileK / 32, worker_warps);
  static constexpr bool even = K % TileK == 0 && TileK % (32 * worker_warps) == 0;  // every warp has as many blocks
  static_assert(K % 32 == 0 && TileK % 32 == 0, "columns come in blocks of 32");
  static_assert(tile_rows * TileK * 2 <= plan::slot_bytes, "a chunk fits a slot of the ring");
  static_assert(max_tokens * ((TileK * 2 + 127) / 128 * 128 + 64) <= activation_bytes, "a chunk's activations fit for all tokens");
};

// The columns [lo, hi) of the activations, bf16, in shared memory: for each token, blocks of 32 columns of 64 bytes.
//
// In a block, lane q of the four that hold a token's operand of the tensor cores finds its 16 bytes at q * 16: columns
// 2q, 2q + 1 of each group of eight. Rows are 64 bytes more than a multiple of 128 apart, so that two do not share banks.
struct Panel {
  int lo, hi;

  static __device__ __forceinline__ u32 row_bytes(int columns) { return (columns * 2 + 127) / 128 * 128 + 64; }
  __device__ __forceinline__ u32 row_bytes() const { return row_bytes(hi - lo); }

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

// Tiles `first` to `first + count` of a block, whose partial sums lie in shared memory: [warp][tile][token][8 rows]. Result
// `i` of a block belongs to thread i % 256.
struct Round {
  int first, count;

  // Index of a result when a tile makes `per_tile` results of each token; the order is tile, token, result.
  struct Place {
    int tile, row;
    u32 token;
  };
  template <int per_tile>
  static __device__ __forceinline__ Place place(u32 index, u32 tokens) {
    const u32 rest = index / per_tile;
    if (tokens == 1) return {static_cast<int>(rest), static_cast<int>(index % per_tile), 0};
    return {static_cast<int>(rest / tokens), static_cast<int>(index % per_tile), rest % tokens};
  }
  // This thread's first result of a round, and where they end.
  template <int per_tile>
  __device__ __forceinline__ u32 begin(const Worker& w) const {
    const u32 lo = first * per_tile * w.tokens;
    return w.thread + (lo + worker_threads - 1 - w.thread) / worker_threads * worker_threads;
  }
  template <int per_tile>
  __device__ __forceinline__ u32 end(const Worker& w) const { return (first + count) * per_tile * w.tokens; }
  __device__ __forceinline__ float sum(const Worker& w, int tile, int row, u32 token) const {
    const float* at = w.partials() + ((tile - first) * w.tokens + token) * tile_rows + row;
    float total = at[0];
#pragma unroll
    for (u32 i = 1; i < worker_warps; ++i) total += at[i * count * w.tokens * tile_rows];
    return total;
  }
};

template <class Shape, class Prologue, class Epilogue>
struct Linear {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    const int panel_chunks = whole_panel(w.tokens) ? Shape::chunks : max_of(1, chunks_that_fit(w.tokens));
    const bool whole = panel_chunks == Shape::chunks;
    Panel panel{0, Shape::k};
    const bool filled = Prologue::prepare(w, entry, whole);
    if (whole) {
      if (!filled) Prologue::fill(w, panel);
      w.sync();
    }
    for (int tile = entry.lo; tile < entry.hi; tile += tiles_per_block) {
      const int tiles = min_of(tiles_per_block, entry.hi - tile);
      typename Epilogue::Early early{};  // on every path, or its registers would count as in use in other tasks
      Epilogue::load_early(w, tile, tiles, early);
      if (w.tokens == 1) {
        one_token(w, tiles, panel, panel_chunks, whole);
        w.sync();
        Epilogue::finish(w, tile, Round{0, tiles}, early);
      } else {
        many_tokens(w, tile, tiles, panel, panel_chunks, whole, early);
      }
      if (tile + tiles_per_block < entry.hi) w.sync();
    }
    w.release_ready();
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ bool whole_panel(u32 tokens) {
    return tokens * Panel::row_bytes(Shape::k) <= activation_bytes;
  }
  static __device__ __forceinline__ int chunks_that_fit(u32 tokens) {
    return (activation_bytes / tokens - 64) / 128 * 128 / (Shape::tile_k * 2);
  }

  // This lane's part of the activations of one block of 32 columns, for two multiplications.
  struct Operand {
    u32 first[4], second[4];

    __device__ __forceinline__ void load(const u8* low, bool has_low, const u8* high, bool has_high) {
      const uint4 none = make_uint4(0, 0, 0, 0);
      const uint4 a = has_low ? *reinterpret_cast<const uint4*>(low) : none;
      const uint4 b = has_high ? *reinterpret_cast<const uint4*>(high) : none;
      first[0] = a.x, first[1] = b.x, first[2] = a.y, first[3] = b.y;
      second[0] = a.z, second[1] = b.z, second[2] = a.w, second[3] = b.w;
    }
  };

  static __device__ __forceinline__ int blocks_of(int chunk) {  // of 32 columns
    return Shape::even ? Shape::tile_k / 32 : min_of(Shape::tile_k, Shape::k - chunk * Shape::tile_k) / 32;
  }
  static __device__ __forceinline__ bool has_block(const Worker& w, int j, int blocks) {
    return Shape::even || static_cast<int>(w.warp + j * worker_warps) < blocks;
  }

  // This warp's part of a chunk of weights.
  static __device__ __forceinline__ void load_weights(Worker& w, int blocks, u32 (&b)[Shape::blocks_per_warp][4]) {
    const u32 weights = ptx::shared_address(w.wait_chunk()) + w.warp * 512 + w.lane * 16;
#pragma unroll
    for (int j = 0; j < Shape::blocks_per_warp; ++j)
      if (has_block(w, j, blocks)) ptx::load_matrices(b[j], weights + j * worker_warps * 512);
    w.free_chunk();
  }

  // The columns from `chunk` on take the place of those before, if that is where they end.
  static __device__ __forceinline__ void next_panel(const Worker& w, Panel& panel, int chunk, int panel_chunks) {
    if (chunk % panel_chunks) return;
    panel = {chunk * Shape::tile_k, min_of((chunk + panel_chunks) * Shape::tile_k, Shape::k)};
    w.sync();
    Prologue::fill(w, panel);
    w.sync();
  }

  // --- one token: lanes 0 to 3 have the results of two rows each

  static __device__ __forceinline__ void one_token(Worker& w, int tiles, Panel& panel, int panel_chunks, bool whole) {
    // between chunks, the two chains of each tile lie behind the partial sums
    float4* chains = reinterpret_cast<float4*>(w.partials() + worker_warps * block_rows) + w.warp * tiles_per_block * 4 + w.lane;
    float2* partial = reinterpret_cast<float2*>(w.partials() + w.warp * tiles * tile_rows) + w.lane;
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
      if (!whole) next_panel(w, panel, chunk, panel_chunks);
      const int blocks = blocks_of(chunk);
      const u8* row = w.activations() + (chunk * Shape::tile_k - panel.lo) * 2 + w.warp * 64 + w.lane * 16;
      uint4 a[Shape::blocks_per_warp];
#pragma unroll
      for (int j = 0; j < Shape::blocks_per_warp; ++j) {
        a[j] = make_uint4(0, 0, 0, 0);
        if (w.lane < 4 && has_block(w, j, blocks)) a[j] = *reinterpret_cast<const uint4*>(row + j * worker_warps * 64);
      }
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        float even[4] = {}, odd[4] = {};
        if (chunk && w.lane < 4) {
          const float4 c = chains[t * 4];
          even[0] = c.x, even[1] = c.y, odd[0] = c.z, odd[1] = c.w;
        }
        u32 b[Shape::blocks_per_warp][4] = {};
        load_weights(w, blocks, b);
#pragma unroll
        for (int j = 0; j < Shape::blocks_per_warp; ++j) {
          if (!has_block(w, j, blocks)) continue;
          const u32 first[4] = {a[j].x, 0, a[j].y, 0}, second[4] = {a[j].z, 0, a[j].w, 0};
          ptx::mma(even, first, b[j][0], b[j][1]);
          ptx::mma(odd, second, b[j][2], b[j][3]);
        }
        if (w.lane >= 4) continue;
        if (chunk + 1 < Shape::chunks)
          chains[t * 4] = make_float4(even[0], even[1], odd[0], odd[1]);
        else
          partial[t * 4] = make_float2(even[0] + odd[0], even[1] + odd[1]);
      }
    }
  }

  // --- several tokens: a block's sums stay in registers while its activations pass by

  static __device__ __forceinline__ void many_tokens(
      Worker& w, int tile, int tiles, Panel& panel, int panel_chunks, bool whole, const typename Epilogue::Early& early) {
    float sums[tiles_per_block][2][4] = {};
    for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
      if (!whole) next_panel(w, panel, chunk, panel_chunks);
      multiply_chunks(w, sums, tiles, chunk, panel);
    }
    finish(w, tile, tiles, sums, early);
  }

  // One chunk of each tile of the block.
  static __device__ __forceinline__ void multiply_chunks(
      Worker& w, float (&sums)[tiles_per_block][2][4], int tiles, int chunk, const Panel& panel) {
    const int blocks = blocks_of(chunk);
    const u32 token = w.lane / 4;
    const u8* row = w.activations() + token * panel.row_bytes() +
                    ((chunk * Shape::tile_k - panel.lo) / 32 + w.warp) * 64 + w.lane % 4 * 16;
    Operand a[Shape::blocks_per_warp];
#pragma unroll
    for (int j = 0; j < Shape::blocks_per_warp; ++j) {
      const bool mine = has_block(w, j, blocks);
      const u8* at = row + j * worker_warps * 64;
      a[j].load(at, mine && token < w.tokens, at + 8 * panel.row_bytes(), mine && token + 8 < w.tokens);
    }
#pragma unroll
    for (int t = 0; t < tiles_per_block; ++t) {
      if (t >= tiles) continue;
      u32 b[Shape::blocks_per_warp][4] = {};
      load_weights(w, blocks, b);
#pragma unroll
      for (int j = 0; j < Shape::blocks_per_warp; ++j) {
        if (!has_block(w, j, blocks)) continue;
        ptx::mma(sums[t][0], a[j].first, b[j][0], b[j][1]);
        ptx::mma(sums[t][1], a[j].second, b[j][2], b[j][3]);
      }
    }
  }

  // Adds up the warps' partial sums of a block, as many tiles at a time as there is room for, and stores the results.
  static __device__ __forceinline__ void finish(
      const Worker& w, int tile, int tiles, const float (&sums)[tiles_per_block][2][4],
      const typename Epilogue::Early& early) {
    const int per_round = w.tokens <= 8 ? tiles_per_block : tiles_per_block / 2;
    for (int first = 0; first < tiles; first += per_round) {
      const Round round{first, min_of(per_round, tiles - first)};
      if (first) w.sync();
      store_partials(w, sums, round);
      w.sync();
      Epilogue::finish(w, tile, round, early);
    }
  }

  static __device__ __forceinline__ void store_partials(
      const Worker& w, const float (&sums)[tiles_per_block][2][4], const Round& round) {
    const u32 token = w.lane / 4, row = w.lane % 4 * 2;
    float* to = w.partials() + (w.warp * round.count * w.tokens + token) * tile_rows + row;
#pragma unroll
    for (int t = 0; t < tiles_per_block; ++t) {
      if (t < round.first || t >= round.first + round.count) continue;
      const auto& s = sums[t];
      float* at = to + (t - round.first) * w.tokens * tile_rows;
      if (token < w.tokens) *reinterpret_cast<float2*>(at) = make_float2(s[0][0] + s[1][0], s[0][1] + s[1][1]);
      if (token + 8 < w.tokens)
        *reinterpret_cast<float2*>(at + 8 * tile_rows) = make_float2(s[0][2] + s[1][2], s[0][3] + s[1][3]);
    }
  }
};

// --- where results go ------------------------------------------------------------------------------------------------

// A tensor [tokens, features] at `offset` of the activation arena.
template <u64 Offset, int Features, class T>
struct Tensor {
  static constexpr int features = Features;
  using type = T;

  static __device__ __forceinline__ u8* at(const Worker& w, int token, int feature) {
    return w.params.arena + Offset + (static_cast<u64>(token) * Features + feature) * sizeof(T);
  }
  static __device__ __forceinline__ void store(const Worker& w, int token, int feature, float value) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float*>(at(w, token, feature)) = value;
    else
      *reinterpret_cast<u16*>(at(w, token, feature)) = ptx::round_bf16(value);
  }
  static __device__ __forceinline__ float load(const Worker& w, int token, int feature) {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(ptx::load_l2_4(at(w, token, feature)));
    else
      return ptx::widen_bf16(ptx::load_l2_2(at(w, token, feature)));
  }
};

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

  static __device__ __forceinline__ void load_early(const Worker&, int, int, Early&) {}

  static __device__ __forceinline__ void finish(const Worker& w, int first_tile, const Round& round, const Early&) {
#pragma unroll 1
    for (u32 i = round.begin<tile_rows>(w); i < round.end<tile_rows>(w); i += worker_threads) {
      const auto at = Round::place<tile_rows>(i, w.tokens);
      const float value = round.sum(w, at.tile, at.row, at.token);
      const int row = (first_tile + at.tile) * tile_rows + at.row;
      if (row < Groups * group_rows) put<0, Parts...>(w, at.token, row / group_rows, row % group_rows, value);
    }
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
