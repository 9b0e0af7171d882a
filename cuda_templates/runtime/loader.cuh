// The loader: streams this SM's weights, chunk after chunk, layer after layer, step after step, and never waits for an event.
//
// Every step streams the same chunks, so it need not know what the next step is about: it runs ahead of the step
// descriptor by at most the ring, and when the kernel ends it only lets the copies in flight land.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// The next chunk to copy. Order: block of tiles, chunk of K, tile of the block; so that activations are read once per block.
struct ChunkCursor {
  const Shared* shared;
  const u8* weights;
  u32 stage = 0, load = 0, load_end = 0;
  i32 block = 0, block_end = 0, hi = 0, tile = 0;
  u32 chunk = 0;
  WeightTiles shape{};
  const u8* base = nullptr;
  const u8* from = nullptr;
  u32 bytes = 0;

  __device__ ChunkCursor(const Shared& s, const u8* w) : shared(&s), weights(w) {
    stage = plan::num_stages - 1;  // as if a step had just ended
    load = load_end = 0;
    next_load();
    point();
  }

  __device__ void next_load() {
    while (load == load_end) {
      stage = stage + 1 == plan::num_stages ? 0 : stage + 1;
      const u32 kind = plan::stage_template[stage];
      load = shared->program.load_begin[kind];
      load_end = shared->program.load_begin[kind + 1];
    }
    const Load& it = shared->program.load[load++];
    shape = plan::weight_tiles[it.shape];
    base = weights + shape.offset + shape.layer_stride * plan::stage_layer[stage];
    block = it.lo;
    hi = it.hi;
    block_end = min_of(block + tiles_per_block, hi);
    tile = block;
    chunk = 0;
  }

  __device__ void point() {
    const u32 at = chunk * shape.chunk_bytes;
    from = base + static_cast<u64>(tile) * shape.tile_bytes + at;
    bytes = min_of(shape.chunk_bytes, shape.tile_bytes - at);
  }

  __device__ void advance() {
    if (++tile == block_end) {
      tile = block;
      if (++chunk == shape.chunks_per_tile) {
        chunk = 0;
        block = block_end;
        tile = block;
        block_end = min_of(block + tiles_per_block, hi);
        if (block >= hi) next_load();
      }
    }
    point();
  }
};

__device__ __forceinline__ bool leaving(const Shared& shared) {
  return ptx::load_shared_flag(&shared.stop) || ptx::load_shared_flag(&shared.abort);
}

// While the ring is full, the loader asks for the chunks that come next to be brought into L2, no faster than memory could
// deliver them and only once all that it copies has arrived: a stall of the workers then leaves memory no more idle.
struct Scout {
  ChunkCursor at;
  u32 ahead = 0;  // chunks from the loader's cursor to this one
  u32 since;

  __device__ Scout(const ChunkCursor& cursor) : at(cursor), since(ptx::clock()) {}

  __device__ __forceinline__ void loaded() { ahead -= ahead != 0; }

  __device__ __forceinline__ void look(const ChunkCursor& cursor, bool all_landed, u32 lane) {
    if (ahead == plan::prefetch_chunks || !all_landed || ptx::clock() - since < plan::prefetch_clocks) return;
    if (ahead == 0) at = cursor;
    if (lane == 0) ptx::prefetch_l2(at.from, at.bytes);
    at.advance();
    ++ahead;
    since = ptx::clock();
  }
};

// Whether the next copy has to wait for one of the `issued` before it. Values that workers look for come through the same
// queues as weights, so there are fewer of these under way until the workers have seen them. Lanes may differ for a moment.
__device__ __forceinline__ bool too_many_in_flight(Shared& shared, u32 issued) {
  u32 most = copies_in_flight;
  if constexpr (copies_while_looking < copies_in_flight)
    if (ptx::load_shared_flag(&shared.looking)) most = copies_while_looking;
  if (issued < most) return false;
  const u32 oldest = issued - most;
  return !ptx::barrier_test(&shared.full[oldest % ring_slots], oldest / ring_slots % 2);
}

// Run by one warp.
__device__ void run_loader(const Params& params, Shared& shared, u8* ring, u32 lane) {
  const plan::Program& program = shared.program;
  if (program.load_begin[plan::num_templates] == 0) return;  // this SM has no weights
  ChunkCursor cursor(shared, params.weights);
  Scout scout(cursor);
  u32 slot = 0, parity = 0, issued = 0;
  bool going = true;
  while (going) {
    while (going && !ptx::barrier_try(&shared.empty[slot], parity ^ 1)) {
      going = !leaving(shared);
      const u32 newest = issued - 1;  // the ring is full, so something was issued
      const bool landed = ptx::barrier_try(&shared.full[newest % ring_slots], newest / ring_slots % 2);
      scout.look(cursor, __all_sync(all_lanes, landed), lane);
    }
    if (!__all_sync(all_lanes, going)) break;
    while (too_many_in_flight(shared, issued)) {}  // a copy that was issued always lands
    __syncwarp();
    probe::pause(params, probe::loading, issued);
    ptx::copy_to_shared(ring + slot * plan::slot_bytes, cursor.from, cursor.bytes, &shared.full[slot], lane);
    ++issued;
    if (++slot == ring_slots) {
      slot = 0;
      parity ^= 1;
    }
    cursor.advance();
    scout.loaded();
    __syncwarp();
  }
  // Shared memory must not be given back while copies are on their way.
  const u32 open = min_of<u32>(issued, copies_in_flight);
  for (u32 i = issued - open; i < issued; ++i)
    while (!ptx::barrier_try(&shared.full[i % ring_slots], i / ring_slots % 2)) {}
}

}  // namespace mpk
