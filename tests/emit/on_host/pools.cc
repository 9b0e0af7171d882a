// Whether loaders that claim tasks share every pool out, each task once, and stream what workers take: the kernel's own Claims and
// ChunkCursor, run on the host, SM after SM in a random order. What stands in for scheduler and workers takes all in the order of
// its queue, and each task only once all groups before are done: as late as events can make it.
//
// Prints what goes wrong, then how many tasks were claimed.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda.h"
#define MPK_POOLS 4
#include "runtime/program.cuh"

namespace plan {
using mpk::u16;
using mpk::u32;
using mpk::u64;
using mpk::u8;

constexpr u32 shared_limit = 232448, ring_slots = 6, slot_bytes = 1024;
constexpr u32 copies_in_flight = 3, copies_while_looking = 2, prefetch_chunks = 5, prefetch_every = 3, prefetch_clocks = 0;
constexpr u32 num_stages = 5, num_layers = 5, num_templates = 3, num_weights = 4, num_events = 1, event_stride = 32;
using Program = mpk::SmProgram<num_templates, 1, 6, 1, 1>;
const u8 stage_template[num_stages] = {0, 1, 1, 1, 2}, stage_layer[num_stages] = {0, 1, 2, 3, 3};
// One chunk a tile, several, and a last one that is shorter.
const mpk::WeightRows weight_rows[num_weights] = {
    {0, 1 << 16, 128, 128, 1}, {1 << 20, 1 << 16, 320, 128, 3}, {2 << 20, 1 << 16, 64, 32, 2}, {3 << 20, 0, 128, 128, 1}};
mpk::CachePages cache_pages[1];
const mpk::Pool pools[] = {{0, 3, 0, 0}, {1, 7, 3, 4}, {2, 2, 10, 12}, {3, 12, 12, 15}};
// Tasks of 1 to 20 tiles of eight rows, some of which end within one; blocks are of eight tiles.
const u32 pool_rows[] = {0,  5,  16, 24, /**/ 0, 160, 163, 232, 240, 256, 320, 321, /**/ 0, 8, 71,
                         /**/ 0, 8, 17, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96};
}  // namespace plan

#include "runtime/loader.cuh"

namespace mpk {
alignas(128) u8 shared_memory[plan::shared_limit];

constexpr i32 own_rows = 85;  // of weight 0, for half of the SMs: what is in their queues
u32 claimed, wrong;
std::vector<u32> events;
u8 weights[4 << 20];

bool operator==(const Chunk& a, const Chunk& b) { return a.from == b.from && a.bytes == b.bytes; }

std::vector<Chunk> chunks_of(u32 weight, i32 lo, i32 hi, u32 layer) {
  const WeightRows& w = plan::weight_rows[weight];
  std::vector<Chunk> all;
  for (i32 block = lo; block < hi; block += block_rows)
    for (u32 chunk = 0; chunk < w.chunks_per_tile; ++chunk)
      for (i32 row = block; row < std::min(block + block_rows, hi); row += tile_rows) {
        const u32 rows = std::min(tile_rows, hi - row), before = chunk * w.chunk_row_bytes;
        all.push_back({weights + w.offset + w.layer_stride * layer + row * w.row_bytes + rows * before,
                       rows * std::min(w.chunk_row_bytes, w.row_bytes - before)});
      }
  return all;
}

// Of a step: the groups in the order of stages, and how many tasks of each are done, of all steps.
struct Group {
  u32 stage, load, tasks;
};
std::vector<Group> groups;
std::vector<std::vector<u32>> done;  // [step * groups][task]
std::vector<u32> finished;

struct Sm {
  Shared shared{};
  ChunkCursor* cursor = nullptr;
  Claims* claims = nullptr;
  std::vector<Chunk> coming;  // worked out, not yet streamed
  std::vector<Chunk> ring;  // streamed, not yet taken
  // The workers' place.
  u32 group = 0, taken = 0, task = 0;  // group: of all steps
  bool running = false;
  std::vector<Chunk> needs;
  size_t used = 0;

  ~Sm() { delete cursor, delete claims; }

  void begin(u32 number, const std::vector<u32>& counters) {
    const bool own = number % 2;
    shared.params.weights = weights;
    shared.params.events = events.data();
    write_program(own);
    for (u32 p = 0; p < num_pools; ++p) shared.round[p] = counters[p];  // as if a launch had run as long
    cursor = new ChunkCursor(shared);
    for (u32 lane = 1; lane < warp_size; ++lane) Claims(shared.params, shared, lane);  // their part of the first tickets
    claims = new Claims(shared.params, shared, 0);
  }
  void write_program(bool own) {
    const u16 n = own;
    Load* to = shared.program.load;
    if (own) *to++ = {0, 0, own_rows};
    *to++ = {0, -1, 0};
    *to++ = {1, -1, 1};
    *to++ = {2, -1, 2};
    *to++ = {3, -1, 3};
    // templates: own and pool 0; pools 1 and 2; pool 3
    const u16 begin[] = {0, static_cast<u16>(n + 1), static_cast<u16>(n + 3), static_cast<u16>(n + 4)};
    for (u32 t = 0; t < 4; ++t) shared.program.load_begin[t] = begin[t];
  }

  // A turn of run_loader. False: it would wait.
  bool load() {
    bool moved = false;
    if (!coming.empty() && ring.size() < plan::ring_slots) {
      ring.push_back(coming[0]);
      coming.erase(coming.begin());
      moved = true;
    }
    if (coming.size() < Upcoming::lanes && !cursor->stands()) {
      claims->look(*cursor);
      coming.push_back(cursor->chunk(cursor->next));
      cursor->advance(1);
      return true;
    }
    if (moved || !cursor->stands() || !coming.empty() || claims->told - shared.claims_taken >= claims_kept) return moved;
    if (!claims->next(*cursor)) ++wrong, std::printf("left a pool\n");
    return true;
  }

  // A turn of scheduler and workers. False: they would wait.
  bool work(u32 number, u32 last) {
    if (group == last) return false;
    const Group& g = groups[group % groups.size()];
    if (!running) {
      if (g.load == ~0u) {  // in the queues of SMs with odd numbers
        if (number % 2 == 0) return ++group, true;
        if (!before_done()) return false;
        needs = chunks_of(0, 0, own_rows, plan::stage_layer[g.stage]);
        task = number / 2;
      } else {
        const u32 word = shared.claim[taken % claims_kept], wanted = claim_word(taken, 0);
        if ((word ^ wanted) > no_more) return false;
        if ((word & no_more) != no_more && !before_done()) return false;  // the events of a claimed task
        shared.claims_taken = ++taken;
        if ((word & no_more) == no_more) return ++group, true;
        task = word & no_more;
        const Pool& pool = plan::pools[g.load];
        needs = chunks_of(pool.weight, plan::pool_rows[pool.row + task], plan::pool_rows[pool.row + task + 1],
                          plan::stage_layer[g.stage]);
        ++claimed;
      }
      running = true;
      used = 0;
    }
    if (ring.empty()) return false;
    if (!(ring[0] == needs[used])) ++wrong, std::printf("SM %u streams something else in group %u\n", number, group);
    ring.erase(ring.begin());
    if (++used < needs.size()) return true;
    running = false;
    if (task >= g.tasks || done[group][task]++) ++wrong, std::printf("task %u of group %u comes twice\n", task, group);
    ++finished[group];
    if (g.load == ~0u) ++group;
    return true;
  }

  bool before_done() const {
    return group == 0 || finished[group - 1] == groups[(group - 1) % groups.size()].tasks;
  }
};

void run(u32 sms, u32 steps, u32 seed, u32 start) {
  groups.clear();
  for (u32 stage = 0; stage < plan::num_stages; ++stage) {
    const u32 kind = plan::stage_template[stage];
    if (kind == 0 && sms / 2) groups.push_back({stage, ~0u, sms / 2});
    const u32 first = kind == 0 ? 0 : kind == 1 ? 1 : 3, last = kind == 0 ? 1 : kind == 1 ? 3 : 4;
    for (u32 p = first; p < last; ++p) groups.push_back({stage, p, plan::pools[p].tasks});
  }
  const u32 all = groups.size() * steps;
  done.assign(all, std::vector<u32>(64));
  finished.assign(all, 0);
  events.assign((plan::num_stages * plan::num_events + num_pools) * plan::event_stride, 0);
  std::vector<u32> counters;
  for (u32 p = 0; p < num_pools; ++p) {
    counters.push_back(start / plan::pools[p].tasks * plan::pools[p].tasks);
    events[(plan::num_stages * plan::num_events + p) * plan::event_stride] = counters[p];
  }
  std::mt19937 random(seed);
  std::vector<Sm> all_sms(sms);
  std::vector<u32> patience(sms);
  for (u32 i = 0; i < sms; ++i) all_sms[i].begin(i, counters);
  u32 idle = 0;
  while (idle < 64 * sms) {
    const u32 i = random() % sms;
    if (patience[i] && idle < 16 * sms) {  // slow for a while, unless the others wait for it
      --patience[i];
      ++idle;
      continue;
    }
    if (random() % 256 == 0) patience[i] = random() % 2048;
    bool moved = false;
    for (u32 turns = random() % 8 + 1; turns; --turns)
      moved |= random() % 2 ? all_sms[i].load() : all_sms[i].work(i, all);
    idle = moved ? 0 : idle + 1;
  }
  for (u32 g = 0; g < all; ++g)
    if (finished[g] != groups[g % groups.size()].tasks) {
      ++wrong;
      std::printf("%u SMs, seed %u: group %u of %u has %u tasks done\n", sms, seed, g, all, finished[g]);
      return;
    }
  for (Sm& sm : all_sms)
    if (sm.group != all) ++wrong, std::printf("%u SMs, seed %u: an SM stands still\n", sms, seed);
}

}  // namespace mpk

int main() {
  for (unsigned seed = 0; seed < 12; ++seed)
    for (unsigned sms : {1, 2, 3, 5, 8, 30}) {
      mpk::run(sms, 20, seed, 0);
      mpk::run(sms, 20, seed, 0u - 37 * (seed + 1));  // tickets pass 2^32
    }
  mpk::run(1, 1600, 0, 0);  // claims of an SM pass 2^16
  std::printf("%u tasks claimed\n", mpk::claimed);
  return mpk::wrong != 0;
}
