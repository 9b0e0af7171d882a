// The kernel's own linear on the host, 256 threads for those of an SM: every task of one weight, of 1, 2, 5 and 16 tokens, its chunks
// in a ring of four by the loader's own cursor. What tiles do not have is NaN.
//
// linear CUT... < inputs > outputs: weights as they are packed and activations, bf16, and a residual, float32 [16 tokens][rows];
// outputs are float32 [4][16 tokens][features]. EPILOGUE 0 stores, 1 adds the residual, 2 gates every other two rows.
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

constexpr u32 shared_limit = 232448, ring_slots = 4, slot_bytes = (8 * CHUNK_COLUMNS * 2 + 127) / 128 * 128;
constexpr u32 copies_in_flight = 3, copies_while_looking = 3, prefetch_chunks = 0, prefetch_every = 1, prefetch_clocks = 0;
constexpr u32 num_stages = 1, num_layers = 1, num_templates = 1, num_weights = 1, num_events = 1, event_stride = 32;
using Program = mpk::SmProgram<num_templates, 1, 1, 1, 1>;
const u8 stage_template[num_stages] = {0}, stage_layer[num_stages] = {0};
const mpk::WeightRows weight_rows[num_weights] = {{0, 0, COLUMNS * 2, CHUNK_COLUMNS * 2, (COLUMNS + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS}};
mpk::CachePages cache_pages[1];
}  // namespace plan

#define private public
#include "runtime/loader.cuh"
#include "tasks/add.cuh"
#include "tasks/gated_act.cuh"
#include "tasks/plain.cuh"

namespace mpk {
alignas(128) u8 shared_memory[plan::shared_limit];

constexpr int features = EPILOGUE == 2 ? ROWS / 2 : ROWS;
constexpr u64 residual_at = max_tokens * COLUMNS * 2, outputs_at = residual_at + max_tokens * ROWS * 4;
using In = Tensor<0, COLUMNS, bf16>;
using Out = Tensor<outputs_at, features, float>;
template <int which>
struct EpilogueOf {
  using type = Store<1, Part<Out, ROWS, NoVector>>;
};
template <>
struct EpilogueOf<1> {
  using type = AddResidual<Tensor<residual_at, ROWS, float>, Out, NoVector>;
};
template <>
struct EpilogueOf<2> {
  using type = GatedAct<Silu, Out, NoVector, NoVector>;
};
using Task = Linear<Tiles<COLUMNS, ROWS, CHUNK_COLUMNS, MOST_TILES>, Plain<In>, EpilogueOf<EPILOGUE>::type>;

void stream(Shared& shared, int lo, int hi) {
  ChunkCursor cursor(shared);
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

void run(u8* arena, const u8* weights, int lo, int hi, u32 tokens) {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));
  Shared& shared = *new (&shared_state()) Shared{};
  shared.params.arena = arena;
  shared.params.weights = const_cast<u8*>(weights);
  shared.params.first_step = 1;
  shared.program.load_begin[1] = 1;
  shared.program.load[0] = {0, lo, hi};
  shared.program.entry[0].lo = lo;
  shared.program.entry[0].hi = hi;
  shared.step[0].tokens = tokens;
  for (u32 i = 0; i < ring_slots; ++i) ptx::barrier_init(&shared.full[i], 1), ptx::barrier_init(&shared.empty[i], worker_warps);
  host::Warp warps[worker_warps];
  host::Operands operands[worker_warps];
  host::workers.size = worker_threads;
  std::vector<std::thread> threads;
  threads.emplace_back(stream, std::ref(shared), lo, hi);
  for (u32 n = 0; n < worker_threads; ++n)
    threads.emplace_back([&, n] {
      host::warp = &warps[n / warp_size], host::lane = n % warp_size, host::operands = &operands[n / warp_size];
      host::warp->size = warp_size;
      threadIdx.x = producer_threads + n;
      Worker w(Progress{}, threadIdx.x);
      if (tokens == 1)
        Task::run_one(w, shared.program.entry[0]);
      else
        Task::run_many(w, shared.program.entry[0]);
    });
  for (std::thread& thread : threads) thread.join();
}
}  // namespace mpk

int main(int count, char** words) {
  std::vector<unsigned char> weights(ROWS * COLUMNS * 2), arena(mpk::outputs_at + 16 * mpk::features * 4);
  if (fread(weights.data(), 1, weights.size(), stdin) != weights.size()) return 2;
  if (fread(arena.data(), 1, mpk::outputs_at, stdin) != mpk::outputs_at) return 2;
  for (int round = 0; round < 4; ++round) {
    const unsigned tokens[4] = {1, 2, 5, 16};
    std::memset(arena.data() + mpk::outputs_at, 0xff, 16 * mpk::features * 4);
    for (int i = 1; i + 1 < count; ++i) mpk::run(arena.data(), weights.data(), atoi(words[i]), atoi(words[i + 1]), tokens[round]);
    fwrite(arena.data() + mpk::outputs_at, 4, 16 * mpk::features, stdout);
  }
}
