// Matrix product with a packed weight: [tokens, K] x [rows, K]^T for 1-16 tokens, on the tensor cores.
//
// Shared memory: the ring (weights), activations 33 KB, partial sums 32 KB. Registers: at most 168.
//
// A weight tile is `tile_rows` rows, stored as chunks of `tile_k` columns, each chunk as [tile_rows / 8][tile_k / 8][8][8]:
// core matrices that ldmatrix (and wgmma without swizzle) reads. The 8 warps share each chunk by blocks of 32 columns.
// Tokens are the 16 rows of mma.m16n8k16, weight rows its 8 columns, so 16 tokens cost what one costs.
// Order of summation of a result: the blocks of 32 columns b, b + 8, ... of a chunk in two chains (halves of a block), the
// chunks in order, then the 8 warps in order. It does not depend on the number of tokens.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// The shape of a packed weight.
template <int K, int Rows, int TileRows, int TileK>
struct Tiles {
  static constexpr int k = K, rows = Rows, tile_rows = TileRows, tile_k = TileK;
  static constexpr int sub_tiles = TileRows / 8;
  static constexpr int chunks = ceil_div(K, TileK);
  static constexpr int tiles_per_block = block_rows / TileRows;
  static constexpr int blocks_per_warp = ceil_div(TileK / 32, worker_warps);
  static_assert(TileRows == 8 || TileRows == 16, "a weight tile has 8 or 16 rows");
  static_assert(K % 32 == 0 && TileK % 32 == 0, "columns come in blocks of 32");
  static_assert(TileRows * TileK * 2 <= plan::slot_bytes, "a chunk fits a slot of the ring");
  static_assert(max_tokens * (TileK + 8) * 2 <= activation_bytes, "one chunk of activations fits for all tokens");
};

// The columns [lo, hi) of the activations, bf16 [tokens][hi - lo + 8] in shared memory (8 of padding spread the banks).
struct Panel {
  int lo, hi;
  __device__ __forceinline__ int stride() const { return hi - lo + 8; }
};

// The rows of a block that one thread finishes.
constexpr int results_per_thread = block_rows * max_tokens / worker_threads;

template <class Shape, class Prologue, class Epilogue>
struct Linear {
  // A block of at most 8 sub-tiles of 8 rows, all tokens: row and token of the i-th result of this thread.
  struct Result {
    int sub, row, token;
  };

  static __device__ __forceinline__ Result result(u32 index, u32 tokens) {
    const u32 rest = index / 8;
    return {static_cast<int>(rest / tokens), static_cast<int>(index % 8), static_cast<int>(rest % tokens)};
  }

  static __device__ __forceinline__ float sum(const Worker& w, int sub, int row, int token) {
    const float* at = w.partials() + (sub * worker_warps * w.tokens + token) * 8 + row;
    float total = at[0];
#pragma unroll
    for (u32 i = 1; i < worker_warps; ++i) total += at[i * w.tokens * 8];
    return total;
  }

  static __device__ __forceinline__ void store_partials(const Worker& w, const float (&acc)[8][4], int subs) {
    const u32 token = w.lane / 4, row = w.lane % 4 * 2;
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      if (s >= subs) continue;
      float* at = w.partials() + (s * worker_warps + w.warp) * w.tokens * 8 + row;
      if (token < w.tokens) *reinterpret_cast<float2*>(at + token * 8) = make_float2(acc[s][0], acc[s][1]);
      if (token + 8 < w.tokens) *reinterpret_cast<float2*>(at + (token + 8) * 8) = make_float2(acc[s][2], acc[s][3]);
    }
  }

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
    // This lane's row of the activation operand; tokens that the step does not have read zeros.
    const u32 token = w.lane % 16;
    const bool present = token < w.tokens;
    const u32 zeros = ptx::shared_address(w.shared.zeros);
    const u32 activations = ptx::shared_address(w.activations());

    for (int tile = entry.lo; tile < entry.hi; tile += Shape::tiles_per_block) {
      const int tiles = min_of(Shape::tiles_per_block, entry.hi - tile);
      const int subs = tiles * Shape::sub_tiles;
      typename Epilogue::Early early;
      Epilogue::load_early(w, tile * Shape::sub_tiles, subs, early);
      float acc[8][4] = {};
      for (int chunk = 0; chunk < Shape::chunks; ++chunk) {
        if (!whole && chunk % panel_chunks == 0) {
          panel = {chunk * Shape::tile_k, min_of((chunk + panel_chunks) * Shape::tile_k, Shape::k)};
          w.sync();
          Prologue::fill(w, panel);
          w.sync();
        }
        const int columns = min_of(Shape::tile_k, Shape::k - chunk * Shape::tile_k);
        const u32 half = w.lane / 16 * 8;  // columns 0-7 or 8-15 of a block of 16
        const u32 row = present ? activations + (token * panel.stride() + chunk * Shape::tile_k - panel.lo + half) * 2 : zeros;
        multiply_chunks(w, acc, tiles, columns, row, present ? 2 : 0);
      }
      store_partials(w, acc, subs);
      w.sync();
      Epilogue::template finish<Linear>(w, tile * Shape::sub_tiles, subs, early);
      if (tile + Shape::tiles_per_block < entry.hi) w.sync();
    }
    w.release_ready();
    w.signal(entry);
  }

 private:
  static __device__ __forceinline__ bool whole_panel(u32 tokens) { return tokens * (Shape::k + 8) * 2 <= activation_bytes; }
  static __device__ __forceinline__ int chunks_that_fit(u32 tokens) {
    return (activation_bytes / (tokens * 2) - 8) / Shape::tile_k;
  }

  // One chunk of each tile of the block. `row`: address of this lane's activation row, `step`: bytes per column of it.
  static __device__ __forceinline__ void multiply_chunks(
      Worker& w, float (&acc)[8][4], int tiles, int columns, u32 row, u32 step) {
    const int blocks = columns / 32;
    u32 a[Shape::blocks_per_warp][2][4];
#pragma unroll
    for (int j = 0; j < Shape::blocks_per_warp; ++j) {
      const int block = w.warp + j * worker_warps;
      if (block < blocks) {
        ptx::load_matrices(a[j][0], row + block * 32 * step);
        ptx::load_matrices(a[j][1], row + (block * 32 + 16) * step);
      }
    }
#pragma unroll
    for (int t = 0; t < Shape::tiles_per_block; ++t) {
      if (t >= tiles) continue;
      const u32 chunk = ptx::shared_address(w.wait_chunk()) + w.lane * 16;
#pragma unroll
      for (int s = 0; s < Shape::sub_tiles; ++s) {
        float(&sum)[4] = acc[t * Shape::sub_tiles + s];
        float odd[4] = {};
#pragma unroll
        for (int j = 0; j < Shape::blocks_per_warp; ++j) {
          const int block = w.warp + j * worker_warps;
          if (block < blocks) {
            u32 b[4];
            ptx::load_matrices(b, chunk + (s * blocks + block) * 512);
            ptx::mma(sum, a[j][0], b[0], b[1]);
            ptx::mma(odd, a[j][1], b[2], b[3]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += odd[i];
      }
      w.free_chunk();
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

  template <class Product>
  static __device__ __forceinline__ void finish(const Worker& w, int first_sub, int subs, const Early&) {
    for (u32 i = w.thread; i < subs * 8 * w.tokens; i += worker_threads) {
      const auto at = Product::result(i, w.tokens);
      const float value = Product::sum(w, at.sub, at.row, at.token);
      const int row = (first_sub + at.sub) * 8 + at.row;
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
