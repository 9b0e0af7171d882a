// Whether the loader streams as many chunks as a task takes: the kernel's own ChunkCursor and Attention, run on the host.
//
// Three stages: a weight, an attention's part of the cache and another weight; the attention alone; and the first once more.
// Prints a line for each load that differs, then how many were compared.
#include <cstdio>
#include <type_traits>
#include <vector>

#include "cuda.h"
#include "runtime/program.cuh"

namespace plan {
using mpk::u32;
using mpk::u64;
using mpk::u8;

constexpr u32 block = 64, dim = 32, most_group = 16, splits_of[] = {1, 2, 3, 5}, max_blocks = 5000;
constexpr u32 shared_limit = 232448, ring_slots = 8, slot_bytes = 8192;
constexpr u32 copies_in_flight = 3, copies_while_looking = 2, prefetch_chunks = 0, prefetch_every = 1, prefetch_clocks = 0;
constexpr u32 num_stages = 3, num_layers = 3, num_templates = 2, num_weights = 1;
using Program = mpk::SmProgram<num_templates, 2, 4, 1, 1>;
const u8 stage_template[num_stages] = {0, 1, 0}, stage_layer[num_stages] = {0, 1, 2};
const mpk::WeightRows weight_rows[num_weights] = {{0, 0, 128, 64, 2}};
mpk::CachePages cache_pages[1];
}  // namespace plan

#include "runtime/loader.cuh"
#include "tasks/attention.cuh"

namespace mpk {
alignas(128) u8 shared_memory[plan::shared_limit];

constexpr u32 tiles[3] = {9, 0, 3};  // of the first weight, and of the second: more and less than a block of them

u32 compared, wrong;
i32 page_table[plan::max_blocks];
u8 cache[1 << 16], weights[1 << 14], arena[1 << 22];

struct Next {
  u32 tokens, position;
};

// Chunks of each load of a step, in order of stages: as the loader streams them.
std::vector<u32> streamed(ChunkCursor& cursor, u32 step) {
  const u32 loads_of[] = {0, 3, 4};  // that come before a stage's
  std::vector<u32> chunks(7);
  while (cursor.step == step) {
    if (cursor.waits) {
      cursor.learn();
      continue;
    }
    const Chunk chunk = cursor.chunk(cursor.next);
    const u8* from = cursor.of_cache ? cache : weights;
    const u32 size = cursor.of_cache ? sizeof(cache) : sizeof(weights);
    if (chunk.bytes == 0 || chunk.bytes % 16 || chunk.bytes > plan::slot_bytes || chunk.from < from ||
        chunk.from + chunk.bytes > from + size)
      ++wrong, std::printf("%u bytes from %td\n", chunk.bytes, chunk.from - from);
    const u32 first = plan::stage_template[cursor.stage] ? 3 : 0;
    ++chunks[loads_of[cursor.stage] + cursor.load - 1 - first];
    cursor.advance(1);
  }
  return chunks;
}

template <u32 Group, u32 Splits>
void compare(const std::vector<Next>& steps, u32 split, u32 first_step) {
  using Q = Tensor<0, Group * plan::dim, bf16>;
  using KV = Tensor<0, plan::dim, bf16>;
  using Out = Tensor<65536, Splits * Group*(plan::dim + 2), float>;
  using Whole = Tensor<65536, Group * plan::dim, bf16>;
  using Task = Attention<AttentionShape<Group, 1, plan::dim, Splits, plan::block>, Q, KV, KV, NoHeadNorms, NoRope, 0,
                         std::conditional_t<Splits == 1, Whole, Out>, 1.f>;
  plan::cache_pages[0] = {0, 1, plan::block, plan::dim * 2, Splits, Group};
  Shared& shared = shared_state();
  shared = {};
  host::full = shared.full, host::empty = shared.empty, host::end = shared.ready;
  shared.params.first_step = shared.described = first_step;
  shared.params.weights = weights;
  shared.params.cache = cache;
  shared.params.arena = arena;
  shared.params.pages = page_table;
  shared.params.context = ~0u;
  const i32 part = split;
  shared.program = {{0, 1, 2}, {0, 3, 4}, {}, {{0, 0, tiles[0] * 8}, {1, 0, part}, {0, 16, 11 + tiles[2] * 8}, {1, 0, part}}, {}, {}};
  Progress progress;
  ChunkCursor cursor(shared);
  for (u32 step = first_step; step != first_step + steps.size(); ++step) {
    const Next& next = steps[step - first_step];
    shared.step[step % 2] = {next.tokens, next.position};
    shared.described = step + 1;
    const std::vector<u32> found = streamed(cursor, step);
    u32 takes[3] = {};
    for (progress.stage = 0; next.tokens && progress.stage < plan::num_stages; ++progress.stage) {
      progress.step_index = step;
      host::taken = host::freed = 0;
      Entry entry{};
      entry.hi = split;
      Worker w(progress, producer_threads);
      Task::run(w, entry);
      takes[progress.stage] = host::taken;
      wrong += host::taken != host::freed;
    }
    const std::vector<u32> wanted{tiles[0] * 2, takes[0], tiles[2] * 2, takes[1], tiles[0] * 2, takes[2], tiles[2] * 2};
    ++compared;
    if (found == wanted) continue;
    ++wrong;
    std::printf("%u tokens at %u, %u heads, split %u of %u:", next.tokens, next.position, Group, split, Splits);
    for (u32 i = 0; i < wanted.size(); ++i) std::printf(" %u/%u", found[i], wanted[i]);
    std::printf("\n");
  }
}

template <u32 Group, u32 Splits>
void all_steps() {
  for (u32 split = 0; split < Splits; ++split) {
    std::vector<Next> steps;
    for (u32 tokens = 1; tokens <= max_tokens; ++tokens)
      for (u32 edge = 0; edge <= 6 * plan::block; edge += plan::block)
        for (i32 off : {-17, -8, -1, 0, 1, 9})
          if (static_cast<i32>(edge) + off >= 0) steps.push_back({tokens, edge + off});
    if (Group % 5 == 1) steps.push_back({3, 262144 - 3});
    steps.push_back({0, 128});  // the end
    compare<Group, Splits>(steps, split, 0);
    compare<Group, Splits>({{16, 400}, {1, 416}, {1, 417}, {0, 418}}, split, 7);  // a launch that goes on
  }
}

template <u32 Group = 1>
void all_groups() {
  all_steps<Group, 1>();
  all_steps<Group, 2>();
  all_steps<Group, 3>();
  all_steps<Group, 5>();
  if constexpr (Group < plan::most_group) all_groups<Group + 1>();
}

}  // namespace mpk

int main() {
  mpk::all_groups();
  std::printf("%u steps compared\n", mpk::compared);
  return mpk::wrong != 0;
}
