// The kernel's own attention on the host, 256 threads for those of an SM: every task of steps that begin anywhere, their keys and values
// in a ring of three by the loader's own cursor. What the cache does not have is NaN.
//
// attention POSITION TOKENS POSITION TOKENS... < inputs > outputs: of POSITIONS each, bf16, queries [HEADS * DIM], keys and values
// [KV_HEADS * DIM]. Outputs are of every step [16 tokens][SPLITS][HEADS][DIM + 2] float32, or with one split [16 tokens][HEADS * DIM]
// bf16. Exit code 3: the cache is not as it was before, with the step's own keys and values.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "cuda.h"
#define MPK_POOLS 0
#include "runtime/program.cuh"

namespace plan {
using mpk::u16;
using mpk::u32;
using mpk::u64;
using mpk::u8;

constexpr u32 block = 64, shared_limit = 232448, ring_slots = 3, slot_bytes = block * DIM * 2;
constexpr u32 copies_in_flight = 3, copies_while_looking = 3, prefetch_chunks = 0, prefetch_every = 1, prefetch_clocks = 0;
constexpr u32 num_stages = 1, num_layers = 1, num_templates = 1, num_weights = 1, num_events = 1, event_stride = 32;
using Program = mpk::SmProgram<num_templates, 1, 1, 1, 1>;
const u8 stage_template[num_stages] = {0}, stage_layer[num_stages] = {0};
mpk::WeightRows weight_rows[num_weights];
const mpk::CachePages cache_pages[1] = {{0, KV_HEADS, block, DIM * 2, SPLITS, HEADS / KV_HEADS}};
}  // namespace plan

#define private public
#include "runtime/loader.cuh"
#include "tasks/attention.cuh"

namespace mpk {
alignas(128) u8 shared_memory[plan::shared_limit];

constexpr u32 num_pages = (POSITIONS + plan::block - 1) / plan::block;
constexpr u64 row_q = HEADS * DIM * 2, row_kv = KV_HEADS * DIM * 2, k_at = max_tokens * row_q, v_at = k_at + max_tokens * row_kv;
constexpr u64 out_at = v_at + max_tokens * row_kv, row_out = SPLITS == 1 ? row_q : SPLITS * HEADS * (DIM + 2) * 4;
template <int splits>
struct OutOf {
  using type = Tensor<out_at, splits * HEADS * (DIM + 2), float>;
};
template <>
struct OutOf<1> {
  using type = Tensor<out_at, HEADS * DIM, bf16>;
};
using Task = Attention<
    AttentionShape<HEADS, KV_HEADS, DIM, SPLITS, plan::block>, Tensor<0, HEADS * DIM, bf16>, Tensor<k_at, KV_HEADS * DIM, bf16>,
    Tensor<v_at, KV_HEADS * DIM, bf16>, NoHeadNorms, NoRope, 0, OutOf<SPLITS>::type, SCALE>;

using Bytes = std::vector<u8>;
struct Inputs {
  Bytes q, k, v;
};

i32 page(u32 block) { return num_pages - 1 - block; }

// With the positions before `end`.
Bytes cache_of(const Inputs& in, u32 end) {
  const CachePages& pages = plan::cache_pages[0];
  Bytes cache(num_pages * KV_HEADS * 2 * pages.half_bytes(), 0xff);
  for (u32 position = 0; position < end; ++position)
    for (u32 n = 0; n < row_kv / 16; ++n) {
      const u32 head = n / (DIM / 8), piece = n % (DIM / 8), at = position % plan::block;
      u8* half = &cache[(page(position / plan::block) * KV_HEADS + head) * 2 * pages.half_bytes()];
      std::memcpy(half + at * DIM * 2 + pages.key_place(at, piece) * 16, &in.k[position * row_kv + n * 16], 16);
      std::memcpy(half + pages.half_bytes() + at * DIM * 2 + pages.value_place(at, piece) * 16, &in.v[position * row_kv + n * 16], 16);
    }
  return cache;
}

void stream(Shared& shared) {
  ChunkCursor cursor(shared);
  cursor.learn();
  for (u32 n = 0; n < cursor.end; ++n) {
    const u32 slot = n % ring_slots, parity = n / ring_slots % 2;
    while (!ptx::barrier_try(&shared.empty[slot], parity ^ 1)) {}
    u8* to = shared_memory + slot * plan::slot_bytes;
    std::memset(to, 0xff, plan::slot_bytes);
    const Chunk chunk = cursor.chunk(n);
    std::memcpy(to, chunk.from, chunk.bytes);
    ptx::barrier_arrive(&shared.full[slot]);
  }
}

void run(Bytes& arena, Bytes& cache, u32 position, u32 tokens, i32 head, i32 split) {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));
  Shared& shared = *new (&shared_state()) Shared{};
  shared.params.arena = arena.data();
  shared.params.cache = cache.data();
  shared.params.num_pages = num_pages;  // and `first_step`, 0: the cursor begins with the step before
  for (u32 i = 0; i < num_pages; ++i) shared.pages[i] = page(i);
  shared.program.load_begin[1] = 1;
  shared.program.load[0] = {plan::num_weights, head, split};
  shared.program.entry[0].lo = head;
  shared.program.entry[0].hi = split;
  shared.step[0].tokens = tokens;
  shared.step[0].position = position;
  for (u32 i = 0; i < ring_slots; ++i) ptx::barrier_init(&shared.full[i], 1), ptx::barrier_init(&shared.empty[i], worker_warps);
  for (u32 i = 0; i < ready_depth; ++i) ptx::barrier_init(&shared.taken[i], 1), ptx::barrier_init(&shared.stored[i], worker_warps);
  ptx::barrier_init(&shared.ready[0], 1);
  ptx::barrier_arrive(&shared.ready[0]);
  host::Warp warps[worker_warps];
  host::Operands operands[worker_warps];
  host::workers.size = worker_threads;
  std::vector<std::thread> threads;
  if (split * plan::block < position) threads.emplace_back(stream, std::ref(shared));
  for (u32 n = 0; n < worker_threads; ++n)
    threads.emplace_back([&, n] {
      host::warp = &warps[n / warp_size], host::lane = n % warp_size, host::operands = &operands[n / warp_size];
      host::warp->size = warp_size;
      threadIdx.x = producer_threads + n;
      Worker w(Progress{}, threadIdx.x);
      Task::run(w, shared.program.entry[0]);
    });
  for (std::thread& thread : threads) thread.join();
}
}  // namespace mpk

int main(int count, char** words) {
  using namespace mpk;
  Inputs in{Bytes(POSITIONS * row_q), Bytes(POSITIONS * row_kv), Bytes(POSITIONS * row_kv)};
  for (Bytes* one : {&in.q, &in.k, &in.v})
    if (fread(one->data(), 1, one->size(), stdin) != one->size()) return 2;
  for (int i = 1; i + 1 < count; i += 2) {
    const u32 position = atoi(words[i]), tokens = atoi(words[i + 1]);
    Bytes arena(out_at + max_tokens * row_out, 0xff), cache = cache_of(in, position);
    std::memcpy(&arena[0], &in.q[position * row_q], tokens * row_q);
    std::memcpy(&arena[k_at], &in.k[position * row_kv], tokens * row_kv);
    std::memcpy(&arena[v_at], &in.v[position * row_kv], tokens * row_kv);
    for (int head = 0; head < KV_HEADS; ++head)
      for (int split = 0; split < SPLITS; ++split) run(arena, cache, position, tokens, head, split);
    if (cache != cache_of(in, position + tokens)) return 3;
    fwrite(&arena[out_at], 1, max_tokens * row_out, stdout);
  }
}
