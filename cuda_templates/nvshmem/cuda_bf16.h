// NVSHMEM's headers name the type in signatures that the kernel does not use.
#pragma once
struct __nv_bfloat16 {
  unsigned short bits;
};
