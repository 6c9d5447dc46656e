// A launch: threadgroups one after the other, each with its threadgroup memory full of NaN, its threads in the
// order that was asked for.
#pragma once
#include <vector>
#include "fibers.h"
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile*, size_t);
#endif

namespace msl {

enum Order { FORWARD = 0, REVERSE = 1, RANDOM = 2 };
constexpr size_t MAX_THREADGROUP_BYTES = 32768;

struct Variable { unsigned char *address, *room, *room_end; size_t bytes; const char* name; };
struct Variables { Variable at[64]; int n = 0; };
inline Variables threadgroup_memory;
constexpr size_t ROOM_BYTES = 1024;  // before and behind a threadgroup variable: nothing may be there

MSL_NO_SANITIZER inline void poison(void* p, size_t n) {  // 0xFF.. is a NaN in every float type
  for (volatile unsigned char* q = (unsigned char*)p; n--; q++) *q = 0xFF;
}

// Where a threadgroup variable is declared, in a struct with room around it: known from the first thread on that
// comes by.
__attribute__((noinline)) MSL_NO_SANITIZER inline void is_threadgroup(void* room, void* behind,
                                                                              const char* name) {
  Variables& all = threadgroup_memory;
  for (int i = 0; i < all.n; i++) if (all.at[i].room == room) return;
  if (all.n == 64) return fail("more than 64 threadgroup variables");
  auto start = (unsigned char*)room;
  const size_t bytes = (unsigned char*)behind - start - ROOM_BYTES;
  all.at[all.n++] = {start + ROOM_BYTES, start, (unsigned char*)behind + ROOM_BYTES, bytes, name};
  poison(start + ROOM_BYTES, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(start, ROOM_BYTES);
  __asan_poison_memory_region(start + ROOM_BYTES + bytes, ROOM_BYTES);
#endif
}

MSL_NO_SANITIZER inline uint random(uint& seed, uint below) {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) % below;
}

MSL_NO_SANITIZER inline void permute(std::vector<int>& places, int n, int order, uint& seed) {
  for (int i = 0; i < n; i++) places[i] = order == REVERSE ? n - 1 - i : i;
  if (order == RANDOM) for (int i = n - 1; i > 0; i--) std::swap(places[i], places[random(seed, i + 1)]);
}

MSL_NO_SANITIZER inline void say_deadlock(const std::vector<Fiber>& fibers, int n) {
  int num_waiting = 0, num_done = 0;
  const Fiber* one = nullptr;
  for (int i = 0; i < n; i++) {
    if (fibers[i].is_done) { num_done++; continue; }
    num_waiting++;
    one = &fibers[i];
  }
  char text[400];
  snprintf(text, sizeof text, "deadlock: %d threads wait (thread %u at %s in line %d), %d have returned", num_waiting,
           one->attributes.thread_index_in_threadgroup, one->what, one->line, num_done);
  fail(text);
}

MSL_NO_SANITIZER inline void set_attributes(Attributes& a, const int grid[3], const int size[3], const int count[3],
                                            const int group[3], const int real[3], int i) {
  uint n = real[0] * real[1] * real[2], whole = size[0] * size[1] * size[2];
  vec<uint, 3> at(i % real[0], i / real[0] % real[1], i / real[0] / real[1]);
  a.thread_position_in_threadgroup = at;
  a.threadgroup_position_in_grid = {uint(group[0]), uint(group[1]), uint(group[2])};
  a.thread_position_in_grid = {group[0] * size[0] + at.x, group[1] * size[1] + at.y, group[2] * size[2] + at.z};
  a.threads_per_grid = a.grid_size = {uint(grid[0]), uint(grid[1]), uint(grid[2])};
  a.grid_origin = {0u, 0u, 0u};
  a.threadgroups_per_grid = {uint(count[0]), uint(count[1]), uint(count[2])};
  a.threads_per_threadgroup = {uint(real[0]), uint(real[1]), uint(real[2])};
  a.dispatch_threads_per_threadgroup = {uint(size[0]), uint(size[1]), uint(size[2])};
  a.thread_index_in_threadgroup = i;
  a.thread_index_in_simdgroup = i % SIMD;
  a.thread_index_in_quadgroup = i % 4;
  a.simdgroup_index_in_threadgroup = i / SIMD;
  a.quadgroup_index_in_threadgroup = i / 4;
  a.simdgroups_per_threadgroup = (n + SIMD - 1) / SIMD;
  a.dispatch_simdgroups_per_threadgroup = (whole + SIMD - 1) / SIMD;
  a.quadgroups_per_threadgroup = (n + 3) / 4;
  a.dispatch_quadgroups_per_threadgroup = (whole + 3) / 4;
  a.threads_per_simdgroup = a.thread_execution_width = SIMD;
}

// Runs the fibers of one threadgroup to their ends. False where they fail or wait for each other.
MSL_NO_SANITIZER inline bool run_group(std::vector<Fiber>& fibers, const std::vector<int>& places, int n) {
  for (int live = n; live;) {
    bool has_moved = false;
    for (int k = 0; k < n; k++) {
      Fiber& f = fibers[places[k]];
      if (f.is_done || (f.waits_for && f.waits_for->meetings == f.meeting)) continue;
      f.waits_for = nullptr;
      has_moved = true;
      jump(&scheduler, &f);
      if (f.is_done) live--;
      if (has_failed) return false;
    }
    if (!has_moved) {
      say_deadlock(fibers, n);
      return false;
    }
  }
  return true;
}

// The whole grid, in threads. Returns 0, or 1 with the reason in `error`.
template <class F> MSL_NO_SANITIZER int dispatch(const int grid[3], const int size[3], int order, uint seed, char* stacks, F call) {
  static F* function;
  function = &call;
  entry = [] { (*function)(current->attributes); };
  has_failed = false;
  error[0] = 0;
  num_switches = num_barriers = 0;
  int count[3], whole = size[0] * size[1] * size[2];
  for (int i = 0; i < 3; i++) count[i] = (grid[i] + size[i] - 1) / size[i];
  if (whole > MAX_THREADS) { fail("a threadgroup of more than 1024 threads"); return 1; }
  MSL_KEPT std::vector<Fiber> fibers(MSL_KEPT_SIZE(whole));
  MSL_KEPT std::vector<Simdgroup> simdgroups(MSL_KEPT_SIZE(whole) / SIMD + 1);
  int num_groups = count[0] * count[1] * count[2];
  std::vector<int> places(whole), groups(num_groups);
  permute(groups, num_groups, order, seed);
#if defined(MSL_TSAN)
  scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  for (int number : groups) {
    int at[3] = {number % count[0], number / count[0] % count[1], number / count[0] / count[1]}, real[3];
    for (int i = 0; i < 3; i++) real[i] = grid[i] - at[i] * size[i] < size[i] ? grid[i] - at[i] * size[i] : size[i];
    int n = real[0] * real[1] * real[2];
    for (int i = 0; i < threadgroup_memory.n; i++) poison(threadgroup_memory.at[i].address, threadgroup_memory.at[i].bytes);
    group_number++;
    MSL_ACQUIRE(&group_ends[(group_number + 1) & 1]);  // what ran before this, in other libraries too
    MSL_RELEASE(&group_ends[(group_number + 1) & 1]);
    threadgroup_group = Group{};
    threadgroup_group.members = n;
    for (int i = 0; i * SIMD < n; i++) {
      simdgroups[i].group = Group{};
      simdgroups[i].group.members = n - i * SIMD < SIMD ? n - i * SIMD : SIMD;
    }
    for (int i = 0; i < n; i++) {
      Fiber& f = fibers[i];
      f.is_done = false;
      f.waits_for = nullptr;
      f.simdgroup = &simdgroups[i / SIMD];
      f.lane = i % SIMD;
      set_attributes(f.attributes, grid, size, count, at, real, i);
      prepare(f, stacks + i * STACK_BYTES);
#if defined(MSL_TSAN)
      f.sanitizer = __tsan_create_fiber(0);
#endif
    }
    permute(places, n, order, seed);
    bool is_well = run_group(fibers, places, n);
    MSL_ACQUIRE(&group_ends[group_number & 1]);
#if defined(MSL_TSAN)
    for (int i = 0; i < n; i++) __tsan_destroy_fiber(fibers[i].sanitizer);
#endif
    for (int i = 0; i < n && is_well; i++)
      if (memcmp(stacks + i * STACK_BYTES, &CANARY, sizeof CANARY)) {
        fail("a thread's own arrays are larger than the emulator's stacks of 128 KiB");
        is_well = false;
      }
    if (!is_well) return 1;
    size_t bytes = 0;
    for (int i = 0; i < threadgroup_memory.n; i++) bytes += threadgroup_memory.at[i].bytes;
    if (bytes > MAX_THREADGROUP_BYTES) {
      char text[96];
      snprintf(text, sizeof text, "threadgroup memory of %zu bytes, the limit is %zu", bytes, MAX_THREADGROUP_BYTES);
      fail(text);
      return 1;
    }
  }
  return 0;
}

}  // namespace msl
