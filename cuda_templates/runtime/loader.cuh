// The loader: streams what this SM's tasks read, weights and cached keys and values, chunk after chunk, layer after layer, step
// after step, and never waits for an event.
//
// Every step streams the same weights, so it runs ahead of the step descriptor, by at most the ring; only how much of the cache
// there is to stream it learns from there, and there it waits. When the kernel ends it only lets the copies in flight land.
#pragma once
#include "runtime/worker.cuh"

namespace mpk {

// Where a chunk is copied from.
struct Chunk {
  const u8* from;
  u32 bytes;
};

// Of `a` < 2^21 the quotient, rounded down, without an integer division: that would take 139 cycles on a Hopper GPU.
__device__ __forceinline__ u32 quotient(u32 a, u32 b) { return static_cast<u32>((a + 0.5f) * ptx::reciprocal(static_cast<float>(b))); }

// The load that is streamed next, and how far it is worked out. Order of weights: block of tiles, chunk of K, tile of the block; so
// that activations are read once per block. Order of the cache: pass of query rows, pair of blocks of positions, keys of both before
// their values.
struct ChunkCursor {
  const Shared* shared;
  u32 step, stage, load = 0, load_end = 0;
  bool waits = false;  // for the descriptor of its step, to know what there is of the cache
#if MPK_POOLS
  bool in_pool = false, unclaimed = false;  // `load` is a pool's; of which the next task is to be claimed
  u32 pool = 0;
#endif
  u32 of_cache = 0;  // 0: a weight; else one more than the index into plan::cache_pages
  u32 next = 0, end = 0;  // chunks of the load: the first that is not worked out, and all
  i32 lo = 0, hi = 0;  // rows; of the cache: the split's first block, and how many blocks it has
  bool fenced = false;  // this step's copies see what those before it stored
  WeightRows shape{};
  const u8* base = nullptr;

  // Before the first chunk of the launch.
  __device__ explicit ChunkCursor(const Shared& s) : shared(&s), step(s.params.first_step - 1), stage(plan::num_stages - 1) { next_load(); }

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
    if (it.what >= plan::num_weights) {
      of_cache = it.what - plan::num_weights + 1;
      waits = true;
      base = cache_of_head(*shared, plan::cache_pages[of_cache - 1], it.lo);
      lo = it.hi;
      return;
    }
    begin_weight(it);
  }

  __device__ __forceinline__ void begin_weight(const Load& it) {
    of_cache = 0;
    shape = plan::weight_rows[it.what];
    base = shared->params.weights + shape.offset + shape.layer_stride * plan::stage_layer[stage];
    lo = it.lo;
    hi = it.hi;
    next = 0;
    end = tiles_of(hi - lo) * shape.chunks_per_tile;
  }

#if MPK_POOLS
  // The next task of the pool.
  __device__ void begin_claimed(u32 task) {
    unclaimed = false;
    const u32* rows = plan::pool_rows + plan::pools[pool].row + task;
    begin_weight({plan::pools[pool].weight, static_cast<i32>(rows[0]), static_cast<i32>(rows[1])});
  }
  __device__ void leave_pool() {
    ++load;
    next_load();
  }
  // Whether no more chunks come of a claimed task than a block has tiles.
  __device__ __forceinline__ bool at_end_of_claimed() const { return in_pool && end - next <= tiles_per_block; }
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
    const i32 blocks = ceil_div(now.position, pages.block), splits = pages.splits;
    waits = false;
    hi = blocks > lo ? ceil_div(blocks - lo, splits) : 0;
    next = 0;
    end = 2 * hi * ceil_div(now.tokens * pages.group, CachePages::rows);
    if (end == 0) next_load();
  }

  // Chunk `index` of the load.
  __device__ __forceinline__ Chunk chunk(u32 index) const { return of_cache ? of_pages(index) : of_weight(index); }
  __device__ __forceinline__ Chunk of_weight(u32 index) const {
    const u32 per_block = tiles_per_block * shape.chunks_per_tile, block = end <= per_block ? 0 : quotient(index, per_block);
    const u32 inside = index - block * per_block, first = lo + block * block_rows;
    const u32 tiles = min_of<u32>(tiles_per_block, tiles_of(hi - first)), chunk = quotient(inside, tiles);
    const u32 row = first + (inside - chunk * tiles) * tile_rows, rows = min_of<u32>(tile_rows, hi - row);
    const u32 at = chunk * shape.chunk_row_bytes;
    return {base + static_cast<u64>(row) * shape.row_bytes + at * rows, min_of(shape.chunk_row_bytes, shape.row_bytes - at) * rows};
  }
  __device__ __forceinline__ Chunk of_pages(u32 index) const {
    const CachePages& pages = plan::cache_pages[of_cache - 1];
    const u32 inside = index - quotient(index, 2 * hi) * 2 * hi, first = inside / 4 * 2;
    const bool two = first + 1 < static_cast<u32>(hi);  // blocks, the keys of both before the values
    const u32 block = lo + (first + (two ? inside % 2 : 0)) * pages.splits, half = two ? inside / 2 % 2 : inside % 2;
    const bool wrong = probe::planted(shared->params, probe::wrong_page);  // every second page is the one before it
    const i32 page = page_of(*shared, wrong ? block & ~1u : block);
    return {base + page_offset(*shared, pages, plan::stage_layer[stage], page) + half * pages.half_bytes(),
            min_of(pages.block, shared->step[step % 2].position - block * pages.block) * pages.row_bytes};
  }
  // Past `count` chunks.
  __device__ __forceinline__ void advance(u32 count) {
    next += count;
    if (next == end) next_load();
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

// The copies that come next, numbered from the first of the launch: lane n % lanes has number n. Many are worked out at once, while
// none can be issued: a warp that worked out one after the other would hardly keep up with memory.
struct Upcoming {
  static constexpr u32 lanes = num_pools ? 4 : warp_size;  // what is worked out of a pool is claimed

  u32 lane;
  u32 first = 0, known = 0;  // number of the first that is not issued, and how many are worked out from there on
  u32 sought = 0;  // how many of these are in L2, or passed over
  Chunk chunk{};  // this lane's
  u32 step = 0;

  // Whether this lane has the copy that comes `place` after the first.
  __device__ __forceinline__ bool has(u32 place) const { return lane == (first + place) % lanes; }
  __device__ __forceinline__ bool has_many() const { return known > lanes / 2; }
  __device__ void add(ChunkCursor& cursor) {
    const u32 offset = (lane - first - known) % lanes, count = min_of(lanes - known, cursor.end - cursor.next);
    if (lane < lanes && offset < count) {
      chunk = cursor.chunk(cursor.next + offset);
      step = cursor.step;
    }
    __syncwarp();
    known += count;
    cursor.advance(count);
  }
  __device__ __forceinline__ void pass() {
    ++first;
    --known;
    sought -= sought != 0;
  }
};

// One warp, whose lanes take all branches together. While it can issue nothing it works out what comes, then looks into L2, then
// sleeps. All lanes test the same barrier: 53 cycles on a Hopper GPU, and 12 more for each other one that lanes test at once. How
// long a copy takes from being possible to being issued, and what a loader that waits reads of shared memory, where workers wait
// behind it, both can be measured in milliseconds a token.
struct Loader {
  const Params& params;
  Shared& shared;
  u8* ring;
  u32 lane;
  ChunkCursor cursor;
  Upcoming next;
  u32 slot = 0, parity = 0;  // of the next copy
  u32 since;  // the last prefetch
#if MPK_POOLS
  Claims claims;
#endif

  __device__ Loader(const Params& p, Shared& s, u8* to, u32 l)
      : params(p), shared(s), ring(to), lane(l), cursor(s), next{l}, since(ptx::clock())
#if MPK_POOLS
      , claims(p, s, l)
#endif
  {}

  __device__ void run() {
    while (true) {
      if (!may_go()) {
        if (work_out()) continue;
        if (next.known && has_room()) {
          while (too_many_in_flight()) {}  // a copy that was issued always lands
          __syncwarp();
        } else {
          if (__any_sync(all_lanes, leaving(shared))) break;
#if MPK_POOLS
          if (cursor.unclaimed && next.known == 0 && !claims.next(cursor)) break;
#endif
          seek();
          continue;
        }
      }
      issue();
    }
    // Shared memory must not be given back while copies are on their way.
    for (u32 before = min_of<u32>(next.first, copies_in_flight); before; --before)
      while (!has_landed(before)) {}
  }

 private:
  __device__ __forceinline__ void issue() {
    probe::pause(params, probe::loading, next.first);
    const bool mine = next.has(0);
    ptx::copies_to_shared(ring + slot * plan::slot_bytes, next.chunk.from, next.chunk.bytes, &shared.full[slot], lane, mine);
    if (mine) probe::note_copy(params, next.step, next.first, next.chunk.bytes);
    next.pass();
    if (++slot == ring_slots) {
      slot = 0;
      parity ^= 1;
    }
  }

  // Whether there is a copy that can be issued now.
  __device__ __forceinline__ bool may_go() {
    if (next.known == 0) return false;
    const bool room = ptx::barrier_test(&shared.empty[slot], parity ^ 1), free = !too_many_in_flight();
    return __all_sync(all_lanes, room & free);
  }
  // Whether the ring has room for it.
  __device__ __forceinline__ bool has_room() { return __all_sync(all_lanes, ptx::barrier_test(&shared.empty[slot], parity ^ 1)); }

  // Works out more copies, if there are few and if it is known what comes.
  __device__ __forceinline__ bool work_out() {
    if (next.has_many()) return false;
    if (cursor.waits && __all_sync(all_lanes, cursor.described())) cursor.learn();
    if (cursor.stands()) return false;
#if MPK_POOLS
    claims.look(cursor);
#endif
    next.add(cursor);
    return true;
  }

  // While the ring is full, what comes later is brought into L2, not much faster than memory could deliver it: a stall of the
  // workers then leaves memory no more idle. L2 takes from memory on behalf of all SMs nearly as much as it can give them, so only
  // every `prefetch_every`th chunk comes from there afterwards, and the ones between keep memory busy.
  __device__ __forceinline__ void seek() {
    const u32 place = next.sought + (plan::prefetch_every - (next.first + next.sought) % plan::prefetch_every) % plan::prefetch_every;
    if (place >= min_of(next.known, plan::prefetch_chunks * plan::prefetch_every)) {
      ptx::barrier_try(&shared.empty[slot], parity ^ 1);  // sleeps for a while
      return;
    }
    if (!__all_sync(all_lanes, ptx::clock() - since >= plan::prefetch_clocks)) return;
    if (next.has(place)) ptx::prefetch_l2(next.chunk.from, next.chunk.bytes);
    next.sought = place + 1;
    since = ptx::clock();
  }

  // Whether the copy `before` the next one has landed. Of one before the first of the launch it says yes.
  __device__ __forceinline__ bool has_landed(u32 before) {
    const bool round_before = slot < before;
    return ptx::barrier_test(&shared.full[slot - before + (round_before ? ring_slots : 0)], parity ^ round_before);
  }
  // Whether the next copy has to wait for one before it. Values that workers look for come through the same queues as these, so
  // there are fewer of these under way until the workers have seen them. Lanes may differ for a moment.
  __device__ __forceinline__ bool too_many_in_flight() {
    u32 most = copies_in_flight;
    if constexpr (copies_while_looking < copies_in_flight)
      if (ptx::load_shared_flag(&shared.looking)) most = copies_while_looking;
    return !has_landed(most);
  }
};

__device__ void run_loader(const Params& params, Shared& shared, u8* ring, u32 lane) {
  if (shared.program.load_begin[plan::num_templates] == 0) return;  // this SM's tasks read neither weights nor the cache
  Loader(params, shared, ring, lane).run();
}

}  // namespace mpk
