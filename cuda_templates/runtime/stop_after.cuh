// A build for finding the first wrong operator: the launch's first step ends after a group of a stage, and the kernel with it,
// so that the host can look at what lies in memory. MPK_STOP_AFTER is off by default, and then nothing of it is compiled.
//
// The host writes `megakernel_stop`, runs one step, and must set the events back: the step's later signals never come.
#pragma once
#include "runtime/types.cuh"

#ifndef MPK_STOP_AFTER
#define MPK_STOP_AFTER 0
#endif

#if MPK_STOP_AFTER
extern "C" __device__ mpk::u32 megakernel_stop[2] = {0xffffffffu, 0xffffffffu};  // stage, group; as it is: run on
#endif

namespace mpk {

// Whether a task of this group comes after the end. Queues are in the order of groups, so that what is left out is a tail.
__device__ __forceinline__ bool beyond_stop(u32 stage, u32 group) {
#if MPK_STOP_AFTER
  return stage > megakernel_stop[0] || (stage == megakernel_stop[0] && group > megakernel_stop[1]);
#else
  return false;
#endif
}

// Whether no step may follow the launch's first one.
__device__ __forceinline__ bool stops_early() {
#if MPK_STOP_AFTER
  return megakernel_stop[0] != 0xffffffffu;
#else
  return false;
#endif
}

}  // namespace mpk
