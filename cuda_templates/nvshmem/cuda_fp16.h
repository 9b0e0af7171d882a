// NVSHMEM's headers name the type in signatures that the kernel does not use.
#pragma once
struct half {
  unsigned short bits;
};
