// One fiber for each Metal thread of a threadgroup. They run one at a time, in a chosen order, until they meet at
// a barrier or a collective of their simdgroup; whoever is last to arrive lets the others go on.
#pragma once
#include <cstdio>
#include <cstdlib>
#include "vectors.h"
#if defined(__APPLE__) && !defined(__x86_64__) && !defined(__aarch64__)
#error "no way to switch fibers on this processor"
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define MSL_UCONTEXT 1
#endif
#if defined(MSL_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define MSL_NO_SANITIZER __attribute__((no_sanitize("thread")))
#define MSL_KEPT static  // what fibers have touched is never freed: that would be a race with fibers long gone
#define MSL_KEPT_SIZE(n) MAX_THREADS
#define MSL_ACQUIRE(p) __tsan_acquire(p)
#define MSL_RELEASE(p) __tsan_release(p)
#else
#define MSL_NO_SANITIZER __attribute__((no_sanitize("thread")))
#define MSL_KEPT
#define MSL_KEPT_SIZE(n) n
#define MSL_ACQUIRE(p)
#define MSL_RELEASE(p)
#endif

namespace msl {

constexpr int SIMD = 32;
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr uint64_t CANARY = 0x6d616372616d65;

struct Attributes {  // what stands in [[brackets]] behind a parameter
  vec<uint, 3> thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid,
      threadgroups_per_grid, threads_per_grid, threads_per_threadgroup, dispatch_threads_per_threadgroup, grid_size,
      grid_origin;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_quadgroup,
      simdgroup_index_in_threadgroup, quadgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      dispatch_simdgroups_per_threadgroup, quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup,
      threads_per_simdgroup, thread_execution_width;
};

struct Group {  // fibers that meet: a threadgroup or a simdgroup
  int members = 0, num_arrived = 0, line = 0;
  uint64_t meetings = 0;
  uint64_t epoch[2] = {0, 0};  // barriers passed that order threadgroup memory, device memory
  const char* what = nullptr;
};

struct alignas(64) Slot { unsigned char bytes[64]; };
struct Simdgroup { Group group; Slot slots[2][SIMD]; };

struct Fiber {
  void* stack_pointer = nullptr;
  bool is_done = false;
  Group* waits_for = nullptr;
  uint64_t meeting = 0;
  int line = 0;
  const char* what = "";
  Attributes attributes;
  Simdgroup* simdgroup = nullptr;
  uint lane = 0;
#if defined(MSL_UCONTEXT)
  ucontext_t context;
#endif
  void* sanitizer = nullptr;
};

inline Fiber* current = nullptr;
inline Fiber scheduler;
inline Group threadgroup_group;
inline void (*entry)() = nullptr;
inline bool has_failed = false;
inline char error[512];
inline long num_switches = 0, num_barriers = 0;

inline void fail(const char* text) {
  if (!has_failed) snprintf(error, sizeof error, "%s", text);
  has_failed = true;
}

// Saves what a call preserves on the stack, leaves that stack in *save and goes on with the other.
#if defined(__x86_64__)
extern "C" void msl_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));
#if defined(__APPLE__)
#define MSL_SYMBOL "_msl_switch_stack"
#else
#define MSL_SYMBOL "msl_switch_stack"
#endif
asm(".text\n"
    MSL_SYMBOL ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
constexpr int SAVED_WORDS = 6;
#elif defined(__aarch64__)
extern "C" void msl_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));
#if defined(__APPLE__)
#define MSL_SYMBOL "_msl_switch_stack"
#else
#define MSL_SYMBOL "msl_switch_stack"
#endif
asm(".text\n.p2align 2\n"
    MSL_SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif

__attribute__((noinline, no_sanitize("thread"), no_sanitize("address"))) inline void jump(Fiber* from, Fiber* to) {
  num_switches++;
  current = to;
#if defined(MSL_TSAN)
  __tsan_switch_to_fiber(to->sanitizer, 1);
#endif
#if defined(MSL_UCONTEXT)
  swapcontext(&from->context, &to->context);
#else
  msl_switch_stack(&from->stack_pointer, to->stack_pointer);
#endif
}

// A threadgroup reuses the storage of the one before: for ThreadSanitizer they follow each other, their threads do not.
inline char group_ends[2];
inline int group_number = 0;

MSL_NO_SANITIZER inline void trampoline() {
  MSL_ACQUIRE(&group_ends[(group_number + 1) & 1]);
  entry();
  MSL_RELEASE(&group_ends[group_number & 1]);
  Fiber* me = current;
  me->is_done = true;
  jump(me, &scheduler);
  abort();
}

MSL_NO_SANITIZER inline void prepare(Fiber& fiber, char* stack) {
  memcpy(stack, &CANARY, sizeof CANARY);
#if defined(MSL_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, trampoline, 0);
#else
  auto top = (void**)((uintptr_t)(stack + STACK_BYTES) & ~uintptr_t(15));
#if defined(__x86_64__)
  *--top = nullptr;
  *--top = (void*)&trampoline;
  for (int i = 0; i < SAVED_WORDS; i++) *--top = nullptr;
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (void*)&trampoline;  // x30
#endif
  fiber.stack_pointer = top;
#endif
}

// Meets every member of the group. All must come from the same line: anything else is undefined in Metal.
// Returns the number of the meeting. `orders` says which memory the meeting orders (bit 0 threadgroup, bit 1 device).
MSL_NO_SANITIZER inline uint64_t meet(Group& group, int line, const char* what, int orders = 0) {
  Fiber* me = current;
  num_barriers += &group == &threadgroup_group;
  if (group.num_arrived == 0) {
    group.line = line;
    group.what = what;
  } else if (group.line != line || strcmp(group.what, what)) {
    char text[256];
    snprintf(text, sizeof text, "divergent collective: some threads are at %s in line %d, others at %s in line %d",
             group.what, group.line, what, line);
    fail(text);
  }
  uint64_t meeting = group.meetings;
  MSL_RELEASE(&group);
  if (++group.num_arrived == group.members) {
    group.num_arrived = 0;
    group.meetings++;
    group.epoch[0] += orders & 1;
    group.epoch[1] += orders >> 1 & 1;
  } else {
    me->waits_for = &group;
    me->meeting = meeting;
    me->line = line;
    me->what = what;
    jump(me, &scheduler);
  }
  MSL_ACQUIRE(&group);
  return meeting;
}

// One value of each lane of the simdgroup. Two sets of slots, used in turn, are enough: nobody can reach the
// meeting after the next before all have left this one.
template <class T> struct Lanes {
  const Simdgroup* simdgroup;
  int set, n;
  MSL_NO_SANITIZER T operator[](int i) const {
    T value;
    memcpy(&value, simdgroup->slots[set][i].bytes, sizeof(T));
    return value;
  }
};
template <class T> MSL_NO_SANITIZER Lanes<T> exchange(T value, int line, const char* what) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Simdgroup* s = current->simdgroup;
  int set = int(s->group.meetings & 1);
  memcpy(s->slots[set][current->lane].bytes, &value, sizeof(T));
  meet(s->group, line, what);
  return {s, set, s->group.members};
}

}  // namespace msl
