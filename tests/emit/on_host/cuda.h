// CUDA's own names, for device code that a compiler for the host reads.
#pragma once

#define __device__
#define __host__
#define __constant__
#define __shared__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__
#define __align__(n) __attribute__((aligned(n)))

#define MPK_BULK_COPY 1  // see cuda_templates/runtime/ptx.cuh, in whose place the tests have their own
#define MPK_MOVES_REGISTERS 1

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
