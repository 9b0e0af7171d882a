// All roles of the SMs of a plan with claim pools, run on the host: the kernel's own loader, scheduler, signaller and worker loop,
// for the programs that the host packs. Tasks compute nothing; they check what they are given and take their chunks.
//
// roles PROGRAMS SEED: two launches of a few steps. Prints what goes wrong, then how many tasks have run.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cuda.h"
#define MPK_DELAYS 1
#include "plan.h"  // the generated source up to its tasks, and the tables below
// namespace plan: num_sms, weight_bytes, groups, num_tasks[template][group], weight_of[template][group] (-1: none, -2: the cache)
#include "runtime/worker.cuh"

namespace mpk {
alignas(128) u8 shared_memory[plan::shared_limit];

constexpr u32 launches = 2, steps = 4, prompt_tokens = 3, most_tasks = 512;
constexpr u32 counters = plan::num_stages * plan::num_events + num_pools;

// What SMs share.
struct Global {
  Control control;
  HostRing host;
  Report reports[plan::num_sms];
  u32 events[counters * plan::event_stride];
  i32 pages[plan::pages];
  u32 done[launches * steps][plan::num_stages][plan::groups][most_tasks];
  u32 wrong, tasks, sought;
  u8 weights[plan::weight_bytes], cache[plan::cache_bytes];
};
Global* global;

template <class... Words>
void complain(const char* what, Words... words) {
  __atomic_add_fetch(&global->wrong, 1, __ATOMIC_ACQ_REL);
  std::printf(what, words...);
  std::fflush(stdout);
}

struct Stub {
  static void run(Worker& w, const Entry& entry) {
    const u32 kind = plan::stage_template[w.stage];
    const bool attends = plan::weight_of[kind][entry.group] == -2;
    w.wait_ready();
    if (w.thread == 0) check(w, kind, entry);
    if (attends)
      take_cache(w, entry);
    else if (plan::weight_of[kind][entry.group] >= 0)
      take_weight(w, plan::weight_rows[plan::weight_of[kind][entry.group]], entry);
    w.sync();
    if (w.thread == 0 && w.stage + 1 == plan::num_stages && entry.group + 1 == plan::last_groups) publish(w);
    w.release_ready();
    w.signal(entry);
  }

  static void check(const Worker& w, u32 kind, const Entry& entry) {
    if (w.aborted()) return;
    for (u32 i = 0; i < entry.num_waits; ++i) {
      const Wait& wait = w.shared.program.wait[entry.first_wait + i];
      const bool before = wait.back > w.stage;
      const u32 at = before ? w.stage + plan::num_stages - wait.back : w.stage - wait.back;
      const u32 total = plan::event_total[plan::stage_template[at]][wait.event];
      const u32 wanted = (before ? w.step_index - 1 : w.step_index) * total + wait.count;
      const u32 seen = ptx::load(global->events + (at * plan::num_events + wait.event) * plan::event_stride);
      if (static_cast<i32>(seen - wanted) < 0) complain("stage %u group %u task %u runs early\n", w.stage, entry.group, entry.task);
    }
    if (entry.task >= plan::num_tasks[kind][entry.group] ||
        __atomic_fetch_add(&global->done[w.step_index][w.stage][entry.group][entry.task], 1, __ATOMIC_ACQ_REL))
      complain("stage %u group %u task %u once more\n", w.stage, entry.group, entry.task);
    __atomic_add_fetch(&global->tasks, 1, __ATOMIC_ACQ_REL);
  }

  static void take(Worker& w, const u8* from, u32 bytes) {
    w.wait_chunk();
    if (!w.aborted() && std::memcmp(w.chunk(), from, bytes)) complain("another chunk in stage %u, group %u\n", w.stage, w.group);
    w.free_chunk();
  }
  static void take_weight(Worker& w, const WeightRows& shape, const Entry& entry) {
    const u8* base = global->weights + shape.offset + shape.layer_stride * w.layer;
    for (i32 block = entry.lo; block < entry.hi; block += block_rows)
      for (u32 chunk = 0; chunk < shape.chunks_per_tile; ++chunk)
        for (i32 row = block; row < std::min(block + block_rows, entry.hi); row += tile_rows) {
          const u32 rows = std::min(tile_rows, entry.hi - row), before = chunk * shape.chunk_row_bytes;
          take(w, base + static_cast<u64>(row) * shape.row_bytes + rows * before,
               rows * std::min(shape.chunk_row_bytes, shape.row_bytes - before));
        }
  }
  static void take_cache(Worker& w, const Entry& entry) {
    const CachePages& pages = plan::cache_pages[0];
    for (i32 pass = 0; pass < ceil_div(w.tokens * pages.group, CachePages::rows); ++pass)
      for (u32 block = entry.hi, end = ceil_div(w.position, pages.block); block < end; block += 2 * pages.splits)
        for (u32 half = 0; half < 2; ++half)  // the keys of a pair of blocks, then their values
          for (u32 one = block; one < std::min(block + 2 * pages.splits, end); one += pages.splits)
            take(w, cache_of_head(w.shared, pages, entry.lo) +
                        page_offset(w.shared, pages, w.layer, page_of(w.shared, one)) + half * pages.half_bytes(),
                 std::min(pages.block, w.position - one * pages.block) * pages.row_bytes);
  }

  // A launch has `steps` steps, the first one of several tokens.
  static void publish(const Worker& w) {
    const u32 step = w.step_index + 1;
    const u32 words[3] = {step % steps != 0, w.position + w.tokens, 0};
    u64* slot = global->control.steps[step % step_slots];
    for (u32 i = 0; i < step_words; ++i) __atomic_store_n(slot + i, described(step + 1, i < 3 ? words[i] : 0), __ATOMIC_RELEASE);
  }
};

void run_task(Progress& progress, u32, u32 entry) { run_task_as<0, Stub>(progress, entry); }
}  // namespace mpk
#include "runtime/kernel.cuh"

namespace mpk {

// Of what is to be copied, every `prefetch_every`th is brought into L2 before, once, and not from further ahead than was planned.
void check_prefetches() {
  u32 copies = 0, last = 0;
  for (size_t i = 0; i < host::asked.size(); ++i) {
    if (host::asked[i].copied) {
      ++copies;
      continue;
    }
    u32 number = copies;
    size_t at = i;
    while (++at < host::asked.size() && !(host::asked[at].copied && host::asked[at].from == host::asked[i].from))
      number += host::asked[at].copied;
    __atomic_add_fetch(&global->sought, 1, __ATOMIC_ACQ_REL);
    if (at == host::asked.size()) continue;  // the launch ended before
    if (number % plan::prefetch_every || number - copies >= plan::prefetch_chunks * plan::prefetch_every || (last && number <= last))
      complain("copy %u brought into L2 before copy %u, after %u\n", number, copies, last);
    last = number;
  }
}

void run_sm(const Params& params, u32 number) {
  blockIdx.x = number;
  gridDim.x = plan::num_sms;
  Shared& shared = shared_state();
  for (threadIdx.x = 0; threadIdx.x < block_threads; ++threadIdx.x) set_up(params, shared);
  // The loader's lanes have a copy each; else a lane for each word of a descriptor, and for each signal.
  const u32 lanes[4] = {Upcoming::lanes, step_words, 1, 8};
  host::Warp warps[4 + worker_warps];
  warps[0].size = 1, host::warp = &warps[0];
  for (u32 lane = Upcoming::lanes; lane < warp_size; ++lane) Claims(params, shared, lane);  // their part of the first tickets
  host::workers.size = worker_warps;
  std::vector<std::thread> threads;
  for (u32 w = 0; w < 4 + worker_warps; ++w) {
    warps[w].size = w < 4 ? lanes[w] : 1;
    for (u32 lane = 0; lane < warps[w].size; ++lane)
      threads.emplace_back([&, w, lane] {
        host::warp = &warps[w], host::lane = lane, threadIdx.x = w * warp_size + lane;
        if (w == 0) run_loader(params, shared, shared_memory, lane);
        if (w == 1) Scheduler(params, shared, lane).run();
        if (w == 2) run_lookout(params, shared, lane);
        if (w == 3) Signaller(params, shared, lane).run();
        if (w > 3) run_worker(params, shared);
      });
  }
  for (std::thread& t : threads) t.join();
  check_prefetches();
}

// As Launcher.start does.
void launch(Params params, u32 first_step) {
  params.first_step = first_step;
  for (u32 i = 0; i < num_pools; ++i) global->events[(plan::num_stages * plan::num_events + i) * plan::event_stride] = 0;
  const u32 words[3] = {prompt_tokens, 100 + first_step, 0};
  for (auto& slot : global->control.steps)
    for (u64& word : slot) word = described(first_step, 0);
  for (u32 i = 0; i < step_words; ++i)
    global->control.steps[first_step % step_slots][i] = described(first_step + 1, i < 3 ? words[i] : 0);
  for (u32 sm = 0; sm < plan::num_sms; ++sm)
    if (fork() == 0) {
      run_sm(params, sm);
      std::_Exit(0);
    }
  for (u32 sm = 0; sm < plan::num_sms; ++sm) {
    int status = 0;
    wait(&status);
    if (status) complain("an SM ended with %d\n", status);
  }
  if (!global->control.abort) return;
  for (u32 sm = 0; sm < plan::num_sms; ++sm) {
    const Report& r = global->reports[sm];
    complain("SM %u: given %u, taken %u, step %u, stage %u, group %u, task %u, event %u at %u of %u\n", sm, r.given, r.taken, r.step,
             r.stage, r.group, r.task, r.event, r.seen, r.wanted);
  }
}

}  // namespace mpk

int main(int, char** words) {
  using namespace mpk;
  global = static_cast<Global*>(mmap(nullptr, sizeof(Global), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::FILE* file = std::fopen(words[1], "rb");
  std::vector<u8> programs(1 << 24);
  std::fread(programs.data(), 1, programs.size(), file);
  for (u32 i = 0; i < sizeof(global->weights); ++i) global->weights[i] = i * 2654435761u >> 13;
  for (u32 i = 0; i < sizeof(global->cache); ++i) global->cache[i] = i * 2246822519u >> 11;
  for (i32 i = 0; i < static_cast<i32>(plan::pages); ++i) global->pages[i] = i;
  Params params{};
  params.weights = global->weights, params.cache = global->cache, params.pages = global->pages;
  params.program = programs.data(), params.events = global->events, params.control = &global->control;
  params.reports = global->reports, params.host = &global->host;
  params.num_pages = plan::pages, params.timeout_ns = 20'000'000'000ull, params.probes.delay_seed = std::atoi(words[2]);
  for (u32 n = 0; n < launches && !global->wrong; ++n) launch(params, n * steps);
  for (u32 step = 0; step < launches * steps; ++step)
    for (u32 stage = 0; stage < plan::num_stages; ++stage)
      for (u32 g = 0; g < plan::groups; ++g)
        for (u32 t = 0; t < plan::num_tasks[plan::stage_template[stage]][g]; ++t)
          if (global->done[step][stage][g][t] != 1 && global->wrong < 20)
            complain("step %u, stage %u, group %u, task %u ran %u times\n", step, stage, g, t, global->done[step][stage][g][t]);
  if (plan::prefetch_chunks && !global->sought) complain("nothing was brought into L2\n");
  std::printf("%u tasks ran\n", global->tasks);
  return global->wrong != 0;
}
