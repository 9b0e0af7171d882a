// Matrix product with a packed weight: [tokens, K] x [rows, K]^T for 1-16 tokens, on the tensor cores.
//
// Shared memory: the ring (weights), activations 33 KB, partial sums 16 KB. Registers: at most 168.
//
// A weight tile is 8 rows, stored as chunks of `tile_k` columns, each chunk as [tile_k / 32][4][8][8]: core matrices that
// ldmatrix (and wgmma without swizzle) reads. A warp takes a chunk. Tokens are the 16 rows of mma.m16n8k16, weight rows its 8
// columns, so 16 tokens cost what one costs. Order of summation of a result: four chains over a chunk, of the first and of
// the second 16 columns of its even and of its odd blocks of 32; their sum; then the chunks in order. It does not depend on
// the number of tokens.
//
// Little code: the tasks of a layer must fit the instruction cache, or fetching them costs more than the arithmetic.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// The shape of a packed weight.
template <int K, int Rows, int TileK>
struct Tiles {
  static constexpr int k = K, rows = Rows, tile_k = TileK;
  static constexpr int chunks = ceil_div(K, TileK);
  static constexpr int at_once = TileK % 256 == 0 ? 8 : 4;  // blocks of 32 columns that are loaded before they are multiplied
  static_assert(K % 32 == 0 && TileK % 32 == 0, "columns come in blocks of 32");
  static_assert(tile_rows * TileK * 2 <= plan::slot_bytes, "a chunk fits a slot of the ring");
  static_assert(max_tokens * ((TileK * 2 + 127) / 128 * 128 + 64) <= activation_bytes, "a chunk's activations fit for all tokens");

  // Of 32 columns.
  static __device__ __forceinline__ int blocks(int chunk) {
    return K % TileK == 0 ? TileK / 32 : min_of(TileK, K - chunk * TileK) / 32;
  }
};

// The columns [lo, hi) of the activations, bf16, in shared memory: for each token, blocks of 32 columns of 64 bytes.
//
// In a block, lane q of the four that hold a token's operand of the tensor cores finds its 16 bytes at q * 16: columns
// 2q, 2q + 1 of the groups of eight 0, 2, 1 and 3. Rows are 64 bytes more than a multiple of 128 apart, so that two do not
// share banks.
struct Panel {
  int lo, hi;

  static __device__ __forceinline__ u32 row_bytes(int columns) { return (columns * 2 + 127) / 128 * 128 + 64; }
  __device__ __forceinline__ u32 row_bytes() const { return row_bytes(hi - lo); }

  // Where the word with columns `feature`, `feature + 1` (even) of a token goes.
  __device__ __forceinline__ u32* at(const Worker& w, u32 token, int feature) const {
    const u32 column = feature - lo, group = column % 32 / 8;
    const u32 word = column / 32 * 16 + column % 8 / 2 * 4 + group / 2 + group % 2 * 2;
    return reinterpret_cast<u32*>(w.activations() + token * row_bytes()) + word;
  }
  // Four neighbouring columns, the first a multiple of four.
  __device__ __forceinline__ void store_four(const Worker& w, u32 token, int feature, uint2 pairs) const {
    u32* to = at(w, token, feature);
    to[0] = pairs.x;
    to[4] = pairs.y;
  }
};

// A block of tiles whose partial sums lie in shared memory: [part][tile][token][8 rows]. Results are numbered by tile, token
// and row; number `i` belongs to thread i % 256.
struct Block {
  int first, tiles, parts;

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
  __device__ __forceinline__ float sum(const Worker& w, int tile, int row, u32 token) const {
    const u32 stride = tiles * w.tokens * tile_rows;
    const float* at = w.partials() + (tile * w.tokens + token) * tile_rows + row;
    float total = *at;
#pragma unroll 4
    for (int i = 1; i < parts; ++i) total += at[i * stride];
    return total;
  }
};

template <class Shape, class Prologue, class Epilogue>
struct Linear {
  static __device__ void run(Worker& w, const Entry& entry) {
    w.wait_ready();
    const int panel_chunks = whole_panel(w.tokens) ? Shape::chunks : max_of(1, chunks_that_fit(w.tokens));
    const bool whole = panel_chunks == Shape::chunks;
    const bool apart = whole && w.tokens <= 8 && Shape::chunks * w.tokens <= partial_bytes / (block_rows * 4);
    Panel panel{0, Shape::k};
    const bool filled = Prologue::prepare(w, entry, whole);
    if (whole) {
      if (!filled) Prologue::fill(w, panel);
      w.sync();
    }
    for (int tile = entry.lo; tile < entry.hi; tile += tiles_per_block) {
      const Block block{tile, min_of(tiles_per_block, entry.hi - tile), apart ? Shape::chunks : 1};
      typename Epilogue::Early early{};  // on every path, or its registers would count as in use in other tasks
      Epilogue::load_early(w, block, early);
      if (apart)
        chunks_apart(w, block.tiles);
      else
        tiles_apart(w, block.tiles, panel, panel_chunks, whole);
      w.sync();
      Epilogue::finish(w, block, early);
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

  // Few tokens: every warp takes the next chunk, whatever its tile. The operand's rows 8 to 15, which no token needs, take the
  // other half of a block's columns: a result is the sum of rows r of one multiplication and r + 8 of the other.
  static __device__ __forceinline__ void chunks_apart(Worker& w, int tiles) {
    const u32 token = w.lane / 4;
    const bool present = token < w.tokens;
    const u32 row = ptx::shared_address(w.activations()) + token * Panel::row_bytes(Shape::k) + w.lane % 4 * 16;
    float2* to = reinterpret_cast<float2*>(w.partials() + token * tile_rows) + w.lane % 4;
    const int count = Shape::chunks * tiles;
    u32 a[Shape::at_once][4] = {};  // of absent tokens they stay zero
#pragma unroll 1
    for (int n = w.warp; n < count; n += worker_warps) {
      const int chunk = n / tiles;
      const u32 weights = w.wait_chunk(n) + w.lane * 16;
      float sums[2][2][4] = {};
      each_block(chunk, [&](int at, int j) {
        u32 b[4];
        ptx::load_matrices(b, weights + at * 512);
        ptx::load_shared_16(a[j], row + (chunk * (Shape::tile_k / 32) + at) * 64, present);
        ptx::mma(sums[j % 2][0], a[j], b[0], b[1]);
        ptx::mma(sums[j % 2][1], a[j], b[2], b[3]);
      });
      w.free_chunk(n);
      if (present)
        to[n * w.tokens * 4] = make_float2((sums[0][0][0] + sums[0][1][2]) + (sums[1][0][0] + sums[1][1][2]),
                                           (sums[0][0][1] + sums[0][1][3]) + (sums[1][0][1] + sums[1][1][3]));
    }
    w.pass_chunks(count);
  }

  // Many tokens, or long rows: warp t takes all chunks of tile t, while the activations pass by.
  static __device__ __forceinline__ void tiles_apart(
      Worker& w, int tiles, Panel& panel, int panel_chunks, bool whole) {
    const u32 token = w.lane / 4;
    float total[4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
      if (!whole && chunk % panel_chunks == 0) {
        panel = {chunk * Shape::tile_k, min_of((chunk + panel_chunks) * Shape::tile_k, Shape::k)};
        w.sync();
        Prologue::fill(w, panel);
        w.sync();
      }
      if (static_cast<int>(w.warp) >= tiles) continue;
      const int n = chunk * tiles + w.warp;
      const u32 weights = w.wait_chunk(n) + w.lane * 16;
      const u32 row = ptx::shared_address(w.activations()) + token * panel.row_bytes() +
                      (chunk * Shape::tile_k - panel.lo) * 2 + w.lane % 4 * 16;
      float sums[2][2][4] = {};
      each_block(chunk, [&](int at, int j) {
        u32 b[4], low[4] = {}, high[4] = {};
        ptx::load_matrices(b, weights + at * 512);
        ptx::load_shared_16(low, row + at * 64, token < w.tokens);
        ptx::load_shared_16(high, row + at * 64 + 8 * panel.row_bytes(), token + 8 < w.tokens);
        const u32 first[4] = {low[0], high[0], low[2], high[2]}, second[4] = {low[1], high[1], low[3], high[3]};
        ptx::mma(sums[j % 2][0], first, b[0], b[1]);
        ptx::mma(sums[j % 2][1], second, b[2], b[3]);
      });
      w.free_chunk(n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = (sums[0][0][i] + sums[0][1][i]) + (sums[1][0][i] + sums[1][1][i]);
        total[i] = chunk ? total[i] + sum : sum;
      }
    }
    w.pass_chunks(Shape::chunks * tiles);
    if (static_cast<int>(w.warp) >= tiles) return;
    float* to = w.partials() + (w.warp * w.tokens + token) * tile_rows + w.lane % 4 * 2;
    if (token < w.tokens) *reinterpret_cast<float2*>(to) = make_float2(total[0], total[1]);
    if (token + 8 < w.tokens) *reinterpret_cast<float2*>(to + 8 * tile_rows) = make_float2(total[2], total[3]);
  }

  // Calls work(block, its place among those at once) for every block of 32 columns of a chunk, some at once.
  template <class Work>
  static __device__ __forceinline__ void each_block(int chunk, Work work) {
    const int blocks = Shape::blocks(chunk);
    int at = 0;
#pragma unroll 1
    for (; at + Shape::at_once <= blocks; at += Shape::at_once) {
#pragma unroll
      for (int j = 0; j < Shape::at_once; ++j) work(at + j, j);
    }
    if constexpr (Shape::tile_k / 32 % Shape::at_once || Shape::k % Shape::tile_k) {
#pragma unroll
      for (int j = 0; j < Shape::at_once - 1; ++j)
        if (at + j < blocks) work(at + j, j);
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

  static __device__ __forceinline__ void load_early(const Worker&, const Block&, Early&) {}

  static __device__ __forceinline__ void finish(const Worker& w, const Block& block, const Early&) {
#pragma unroll 1
    for (u32 i = w.thread; i < block.tiles * tile_rows * w.tokens; i += worker_threads) {
      const auto at = Block::place<tile_rows>(i, w.tokens);
      const float value = block.sum(w, at.tile, at.row, at.token);
      const int row = (block.first + at.tile) * tile_rows + at.row;
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
