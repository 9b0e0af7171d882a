// The loader: streams what this SM's tasks read, weights and cached keys and values, chunk after chunk, layer after layer, step
// after step, and never waits for an event.
//
// Every step streams the same weights, so it runs ahead of the step descriptor, by at most the ring; only how much of the cache
// there is to stream it learns from there, and there it waits. When the kernel ends it only lets the copies in flight land.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// The next chunk to copy. Order of weights: block of tiles, chunk of K, tile of the block; so that activations are read once per
// block. Order of the cache: pass of query rows, block of positions, keys before values.
struct ChunkCursor {
  const Shared* shared;
  u32 step, stage, load = 0, load_end = 0;
  bool waits = false;  // for the descriptor of its step, to know what there is of the cache
#if MPK_POOLS
  bool in_pool = false, unclaimed = false;  // `load` is a pool's; of which the next task is to be claimed
  u32 pool = 0;
#endif
  u32 of_cache = 0;  // 0: a weight; else one more than the index into plan::cache_pages
  i32 block = 0, block_end = 0, hi = 0, tile = 0;  // of the cache: first block of a pass, passes left, last block, this block
  u32 chunk = 0;  // of the cache: 0 keys, 1 values
  i32 next_page = 0;  // of the cache's block that comes after, asked for a block ahead
  bool fenced = false;  // this step's copies see what those before it stored
  WeightTiles shape{};
  const u8* base = nullptr;
  const u8* from = nullptr;
  u32 bytes = 0;

  // Before the first chunk of the launch.
  __device__ explicit ChunkCursor(const Shared& s) : shared(&s), step(s.params.first_step - 1), stage(plan::num_stages - 1) {
    next_load();
    point();
  }

  __device__ void next_load() {
    while (load == load_end) {
      stage = stage + 1 == plan::num_stages ? 0 : stage + 1;
      if (stage == 0) ++step, fenced = false;
      const u32 kind = plan::stage_template[stage];
      load = shared->program.load_begin[kind];
      load_end = shared->program.load_begin[kind + 1];
    }
    const Load& it = shared->program.load[load++];
#if MPK_POOLS
    in_pool = unclaimed = it.lo < 0;
    pool = it.hi;
    if (in_pool) {
      --load;  // to come back here after each task
      return;
    }
#endif
    chunk = 0;
    if (it.what >= plan::num_weights) {
      of_cache = it.what - plan::num_weights + 1;
      waits = true;
      base = cache_of_head(*shared, plan::cache_pages[of_cache - 1], it.lo);
      block = tile = it.hi;
      return;
    }
    begin_weight(it);
  }

  __device__ __forceinline__ void begin_weight(const Load& it) {
    of_cache = 0;
    shape = plan::weight_tiles[it.what];
    base = shared->params.weights + shape.offset + shape.layer_stride * plan::stage_layer[stage];
    block = it.lo;
    hi = it.hi;
    block_end = min_of(block + tiles_per_block, hi);
    tile = block;
  }

#if MPK_POOLS
  // The next task of the pool.
  __device__ void begin_claimed(u32 task) {
    unclaimed = false;
    chunk = 0;
    const u16* tiles = plan::pool_tiles + plan::pools[pool].tile + task;
    begin_weight({plan::pools[pool].weight, tiles[0], tiles[1]});
    point();
  }
  __device__ void leave_pool() {
    ++load;
    next_load();
    point();
  }
  // Whether no more chunks come of a claimed task than a block has tiles.
  __device__ __forceinline__ bool at_end_of_claimed() const {
    return in_pool && block_end == hi && chunk + 1 == shape.chunks_per_tile;
  }
#endif

  // Whether what comes next has to be learned or claimed first.
  __device__ __forceinline__ bool stands() const {
#if MPK_POOLS
    return waits || unclaimed;
#else
    return waits;
#endif
  }

  // Whether what it waits for is there.
  __device__ __forceinline__ bool described() const {
    return static_cast<i32>(ptx::load_shared_flag(&shared->described) - (step + 1)) >= 0;
  }
  // Of a cursor that waits, when its step is described. Afterwards it may wait again.
  __device__ void learn() {
    if (!fenced) ptx::fence_copies();
    fenced = true;
    const CachePages& pages = plan::cache_pages[of_cache - 1];
    const Step& now = shared->step[step % 2];
    waits = false;
    hi = ceil_div(now.position, pages.block);
    block_end = ceil_div(now.tokens * pages.group, CachePages::rows);
    if (tile >= hi || block_end == 0)
      next_load();
    else
      next_page = page_of(*shared, tile);
    point();
  }
  __device__ __forceinline__ i32 block_after() const {
    const i32 next = tile + plan::cache_pages[of_cache - 1].splits;
    return next < hi ? next : block;
  }

  __device__ void point() {
    if (stands()) return;
    if (of_cache) {
      const CachePages& pages = plan::cache_pages[of_cache - 1];
      if (chunk == 0) {
        const bool wrong = probe::planted(shared->params, probe::wrong_page);  // every second page is the one before it
        const i32 page = wrong ? page_of(*shared, tile & ~1) : next_page;
        from = base + page_offset(*shared, pages, plan::stage_layer[stage], page);
        next_page = page_of(*shared, block_after());
      } else {
        from += pages.half_bytes();
      }
      bytes = min_of(pages.block, shared->step[step % 2].position - tile * pages.block) * pages.row_bytes;
      return;
    }
    const u32 at = chunk * shape.chunk_bytes;
    from = base + static_cast<u64>(tile) * shape.tile_bytes + at;
    bytes = min_of(shape.chunk_bytes, shape.tile_bytes - at);
  }

  __device__ void advance() {
    of_cache ? advance_in_cache() : advance_in_weights();
    point();
  }
  __device__ void advance_in_weights() {
    if (++tile < block_end) return;
    tile = block;
    if (++chunk < shape.chunks_per_tile) return;
    chunk = 0;
    block = tile = block_end;
    block_end = min_of(block + tiles_per_block, hi);
    if (block >= hi) next_load();
  }
  __device__ void advance_in_cache() {
    if (++chunk < 2) return;
    chunk = 0;
    tile = block_after();
    if (tile == block && --block_end == 0) next_load();
  }
};

__device__ __forceinline__ bool leaving(const Shared& shared) {
  return ptx::load_shared_flag(&shared.stop) || ptx::load_shared_flag(&shared.abort);
}

#if MPK_POOLS
// What the loader claims, see runtime/pool.cuh.
struct Claims {
  const Params& params;
  Shared& shared;
  u32 lane;
  u32 told = 0;  // to the scheduler
  bool asked = false;
  u32 coming = 0;  // lane 0's: the ticket that was asked for, perhaps on its way

  // A first ticket of every pool.
  __device__ Claims(const Params& p, Shared& s, u32 l) : params(p), shared(s), lane(l) {
    for (u32 pool = lane; pool < num_pools; pool += warp_size) shared.ticket[pool] = ptx::claim(counter(pool));
    __syncwarp();
  }

  __device__ __forceinline__ u32* counter(u32 pool) const {
    return params.events + (plan::num_stages * plan::num_events + pool) * plan::event_stride;
  }

  // Asks for the ticket after that of the cursor's task as late as it can be there in time.
  __device__ __forceinline__ void look(const ChunkCursor& cursor) {
    if (asked || !cursor.at_end_of_claimed()) return;
    asked = true;
    if (lane == 0) coming = ptx::claim(counter(cursor.pool));
  }

  // Sends the cursor to the next task of its pool, or on if that is for a later round. False: it is time to leave.
  __device__ bool next(ChunkCursor& cursor) {
    const u32 pool = cursor.pool, tasks = plan::pools[pool].tasks;
    const u32 ticket = asked ? __shfl_sync(all_lanes, coming, 0) : shared.ticket[pool];
    const u32 task = ticket - shared.round[pool];
    asked = false;
    if (!tell(task < tasks ? task : no_more)) return false;
    if (task < tasks) {
      cursor.begin_claimed(task);
      return true;
    }
    __syncwarp();  // all lanes have read these
    if (lane == 0) {
      shared.ticket[pool] = ticket;
      shared.round[pool] += tasks;
    }
    __syncwarp();
    cursor.leave_pool();
    return true;
  }

 private:
  __device__ __forceinline__ bool tell(u32 task) {
    while (__any_sync(all_lanes, told - ptx::load_shared_flag(&shared.claims_taken) >= claims_kept))
      if (__any_sync(all_lanes, leaving(shared))) return false;
    ptx::fence_block();
    if (lane == 0) ptx::store_shared_flag(&shared.claim[told % claims_kept], claim_word(told, task));
    ++told;
    return true;
  }
};
#endif

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
    if (at.waits) {
      if (!at.described()) return;
      at.learn();
    }
    if (at.stands()) return;
    if (lane == 0) ptx::prefetch_l2(at.from, at.bytes);
    at.advance();
    ++ahead;
    since = ptx::clock();
  }
};

// Whether the next copy has to wait for one of the `issued` before it. Values that workers look for come through the same
// queues as these, so there are fewer of these under way until the workers have seen them. Lanes may differ for a moment.
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
  if (program.load_begin[plan::num_templates] == 0) return;  // this SM's tasks read neither
  ChunkCursor cursor(shared);
  Scout scout(cursor);
  u32 slot = 0, parity = 0, issued = 0;
  bool going = true;
#if MPK_POOLS
  Claims claims(params, shared, lane);
#endif
  while (going) {
    while (going && cursor.stands()) {
#if MPK_POOLS
      if (cursor.unclaimed) {
        going = claims.next(cursor);
        continue;
      }
#endif
      going = !__any_sync(all_lanes, leaving(shared));
      if (__all_sync(all_lanes, cursor.described())) cursor.learn();
    }
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
#if MPK_POOLS
    claims.look(cursor);
#endif
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
