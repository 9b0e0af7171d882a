// Claim pools: groups whose tasks are in no SM's queue. SMs claim them at run time, one after the other, until none is
// left.
//
// A counter for each pool gives tickets, from 0 on in every launch. The stages that have the pool are its rounds, through
// all layers and steps: ticket n is for task n % tasks of round n / tasks. An SM always holds one ticket of each pool
// that it has not used, and if that is for a later round, this round is over for it. So no claim is in vain, and an SM
// may be rounds behind: nobody has to count how often the others came. What the last tickets of a launch were for, nobody
// does.
//
// The loader claims, since weights depend on nothing, while it streams the end of the task before. It tells the scheduler
// of each task, and where a round is over for this SM. The scheduler waits for the task's events and gives workers and
// signaller a copy of its entry in shared memory, and at last one that says that there are no more.
//
// Nobody waits in a circle. What an SM has in its queue before a pool waits for nothing of this pool's round, see
// mpk_spec/emit/pools.py; so it gets to the tasks that it has tickets for, however early it claimed them. And the loader
// waits for the scheduler only behind `claims_kept` claims that are not taken yet, when all is streamed that comes before
// them.
#pragma once
#include "runtime/program.cuh"

namespace mpk {

static_assert(!(MPK_POOLS && (MPK_PROFILE || MPK_CONFORM)), "what is recorded is recorded by place in a queue");

constexpr u32 claims_kept = 16;  // from loader to scheduler: of as many tasks the ring mostly has no chunks
constexpr u32 no_more = 0xffff;  // in place of a task's number

// Where a hand-over is from, for the watchdog.
struct Place {
  u32 step, stage, group, task;
};

// What the roles of an SM tell each other of pools; a base of Shared, so that it takes no room where there are none.
struct PoolBoard {
#if MPK_POOLS
  u32 ticket[num_pools], round[num_pools];  // the loader's: the one that it holds, and the first one of the round to come
  u32 claim[claims_kept];  // see claim_word
  u32 claims_taken;  // by the scheduler
  Entry claimed[probe::hand_overs];  // by hand-over
  Place given_at[probe::hand_overs];  // of every hand-over
#endif
};

// A task of the pool, or `no_more`, with the number of the claim from 1 on: so a word says itself whether it has come.
__host__ __device__ constexpr u32 claim_word(u32 number, u32 task) { return (number + 1) << 16 | task; }

}  // namespace mpk
