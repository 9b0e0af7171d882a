// Claim pools: groups whose tasks no SM has in its queue. SMs claim them at run time, one after the other, until none is left.
//
// A counter for each pool gives tickets, from 0 in every launch. Stages that have the pool are its rounds, through all layers and
// steps: ticket n is for task n % tasks of round n / tasks. An SM always holds one ticket of each pool that it has not used up, and if
// that is for a later round, this round is over for it. So no claim is in vain, and a round needs to know nothing of other SMs.
//
// The loader claims, since weights depend on nothing: a ticket while it streams the end of the task before. It tells the
// scheduler of each task, and where a round is over for this SM. The scheduler waits for the task's events and gives workers and
// signaller the task's entry, a copy in shared memory; at last one that says that there are no more.
//
// Nobody waits in a circle: what an SM has before a pool in its queue waits for nothing of this pool (mpk_spec/emit/pools.py sees to that),
// so it gets to the tasks that it has tickets for, however early it claimed them. The loader waits for the scheduler only where
// `claims_kept` are not taken yet; all that the scheduler and the workers can be waiting for meanwhile is loaded before these.
#pragma once
#include "runtime/program.cuh"

namespace mpk {

static_assert(!(MPK_POOLS && (MPK_PROFILE || MPK_CONFORM)), "what is recorded is recorded by place in a queue");

constexpr u32 claims_kept = 16;  // from loader to scheduler; the ring has chunks of fewer tasks, mostly
constexpr u32 no_more = 0xffff;  // in place of a task's number

// Where something stands, for the watchdog.
struct Place {
  u32 step, stage, group, task;
};

// What the roles of an SM tell each other of pools; a base of Shared, so that it takes no room where there are none.
struct PoolBoard {
#if MPK_POOLS
  u32 ticket[num_pools], round[num_pools];  // that the loader holds, and the first one of the round that comes next
  u32 claim[claims_kept];  // a task, or `no_more`, and the number of the claim, from 1: a word says itself whether it has come
  u32 claims_taken;  // by the scheduler
  Entry claimed[probe::hand_overs];  // by hand-over
  Place given_at[probe::hand_overs];  // of each hand-over
#endif
};

__host__ __device__ constexpr u32 claim_word(u32 number, u32 task) { return (number + 1) << 16 | task; }

}  // namespace mpk
