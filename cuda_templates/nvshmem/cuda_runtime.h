// NVRTC declares what NVSHMEM's device headers take from here.
#pragma once
