// A step that is in the device's queue before its numbers are there waits for them at its head. The host writes
// the numbers, then the flag; both lie in memory that the host and the device see. NVRTC compiles it.
#pragma once
#include <cuda/std/cstdint>

// What the flag was when it was no longer 0; 0 where it still was after bound_ns of the device's clock.
__device__ inline unsigned latch_wait(const volatile unsigned* flag, unsigned long long bound_ns) {
  unsigned long long began, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
  unsigned seen;
  do {
    seen = *flag;
    if (seen != 0) break;
    __nanosleep(200);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - began < bound_ns);
  __threadfence_system();
  return seen;
}

// All threads of the block copy the bytes past every cache that may hold older ones.
__device__ inline void latch_copy(const void* from, void* to, size_t num_bytes) {
  const size_t num_words = num_bytes / 4;
  for (size_t i = threadIdx.x; i < num_words; i += blockDim.x)
    ((unsigned*)to)[i] = ((const volatile unsigned*)from)[i];
  for (size_t i = 4 * num_words + threadIdx.x; i < num_bytes; i += blockDim.x)
    ((unsigned char*)to)[i] = ((const volatile unsigned char*)from)[i];
}
