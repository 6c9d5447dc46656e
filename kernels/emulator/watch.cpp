// What the compiler's instrumentation calls: see watch.h.
#include "watch.h"
#include <dlfcn.h>

namespace msl {
namespace {

void say(void* place, const char* text) {
  if (has_failed) return;
  Dl_info info;
  watch.place = dladdr(place, &info) ? (void*)((char*)place - (char*)info.dli_fbase - 1) : nullptr;
  fail(text);
}

// The barriers that threads have passed order what lies before them for those who met there.
bool is_ordered(const Access& before, int group, uint thread, int memory) {
  if (!before.group || (before.group != group && memory == 0)) return true;
  if (before.group != group) return false;
  if (before.thread == thread && !before.is_of_several) return true;
  if (before.epoch < threadgroup_group.epoch[memory]) return true;
  return before.thread / SIMD == thread / SIMD && !before.is_of_several_simdgroups &&
         before.simdgroup_epoch < current->simdgroup->group.epoch[memory];
}

void follow(Shadow& shadow, bool is_write, int memory, const char* name, long offset, void* place) {
  uint thread = current->attributes.thread_index_in_threadgroup;
  const bool is_read_ordered = is_ordered(shadow.read, group_number, thread, memory);
  if (!is_ordered(shadow.write, group_number, thread, memory) || (is_write && !is_read_ordered)) {
    const Access& other = is_ordered(shadow.write, group_number, thread, memory) ? shadow.read : shadow.write;
    char text[300];
    snprintf(text, sizeof text, "race: thread %u %s byte %ld of %s, which thread %u of %s threadgroup %s with no barrier between",
             thread, is_write ? "writes" : "reads", offset, name, other.thread,
             other.group == group_number ? "this" : "another", &other == &shadow.read ? "reads" : "writes");
    return say(place, text);
  }
  Access now{group_number, thread, threadgroup_group.epoch[memory], current->simdgroup->group.epoch[memory]};
  if (is_write) {
    shadow.write = now;
    shadow.read = Access{};
  } else if (is_read_ordered) {
    shadow.read = now;
  } else {
    shadow.read.is_of_several = true;
    shadow.read.is_of_several_simdgroups |= shadow.read.thread / SIMD != thread / SIMD;
  }
}

uint64_t mixed(uint64_t a, uint64_t b) {
  a ^= b + 0x9e3779b97f4a7c15 + (a << 6) + (a >> 2);
  a *= 0xff51afd7ed558ccd;
  return a ^ (a >> 33);
}

// Whether no other lane of the simdgroup has loaded the same in the same turn: a GPU asks for that once.
bool is_first_of_simdgroup(unsigned char* p, void* place) {
  if (watch.group != group_number) {
    watch.group = group_number;
    watch.visits.clear();
    watch.requests.clear();
  }
  const uint thread = current->attributes.thread_index_in_threadgroup;
  const uint32_t turn = watch.visits[mixed((uint64_t)place, thread)]++;
  return watch.requests.insert(mixed(mixed(mixed((uint64_t)place, thread / SIMD), turn), (uint64_t)p)).second;
}

void in_buffers(unsigned char* p, long n, bool is_write, void* place) {
  char text[300];
  for (int i = 0; i < watch.num_buffers; i++) {
    Buffer& b = watch.buffers[i];
    if (p < b.start || p + n > b.start + b.bytes) continue;
    if (is_write && !b.is_output) {
      snprintf(text, sizeof text, "writes to its input %s", b.name);
      return say(place, text);
    }
    const long offset = p - b.start;
    (is_write ? b.bytes_written : b.bytes_loaded) += n;
    if (!is_write && is_first_of_simdgroup(p, place)) b.bytes_requested += n;
    for (long k = offset; k < offset + n; k++) {
      if (!is_write && !b.was_read[k]) {
        b.was_read[k] = 1;
        b.bytes_touched++;
      }
      if (b.is_output) follow(b.shadow[k], is_write, 1, b.name, k, place);
    }
    return;
  }
  const Buffer* near = &watch.buffers[0];  // the one that it was most likely meant for
  long distance = -1;
  for (int i = 0; i < watch.num_buffers; i++) {
    const Buffer& b = watch.buffers[i];
    long away = p < b.start ? b.start - p : p - (b.start + b.bytes);
    if (distance < 0 || away < distance) { distance = away; near = &b; }
  }
  snprintf(text, sizeof text, "%s %ld bytes at byte %ld of %s, which has %ld", is_write ? "writes" : "reads", n,
           long(p - near->start), near->name, near->bytes);
  say(place, text);
}

__attribute__((noinline)) void touch(void* address, long n, bool is_write, void* place) {
  auto p = (unsigned char*)address;
  if (current == nullptr || current == &scheduler) return;
  if (p + n > watch.start && p < watch.stop) return in_buffers(p, n, is_write, place);
  for (int i = 0; i < threadgroup_memory.n; i++) {
    const Variable& v = threadgroup_memory.at[i];
    if (p + n <= v.room || p >= v.room_end) continue;
    const long offset = p - v.address;
    if (offset < 0 || offset + n > long(v.bytes)) {
      char text[300];
      snprintf(text, sizeof text, "%s %ld bytes at byte %ld of the threadgroup's %s, which has %zu",
               is_write ? "writes" : "reads", n, offset, v.name, v.bytes);
      return say(place, text);
    }
    if (!watch.shadows[i]) watch.shadows[i] = new Shadow[v.bytes];
    for (long k = offset; k < offset + n; k++) follow(watch.shadows[i][k], is_write, 0, v.name, k, place);
    return;
  }
}

}  // namespace
}  // namespace msl

#define MSL_HOOK(name, n, is_write) \
  void name(void* p) { msl::touch(p, n, is_write, __builtin_return_address(0)); }
#define MSL_HOOKS(n)                                                               \
  MSL_HOOK(__tsan_read##n, n, false) MSL_HOOK(__tsan_write##n, n, true)            \
  MSL_HOOK(__tsan_unaligned_read##n, n, false) MSL_HOOK(__tsan_unaligned_write##n, n, true)
#pragma GCC visibility push(hidden)
extern "C" {
MSL_HOOKS(1) MSL_HOOKS(2) MSL_HOOKS(4) MSL_HOOKS(8) MSL_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { msl::touch(p, long(n), false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { msl::touch(p, long(n), true, __builtin_return_address(0)); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  msl::touch((void*)from, long(n), false, __builtin_return_address(0));
  msl::touch(to, long(n), true, __builtin_return_address(0));
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  msl::touch((void*)from, long(n), false, __builtin_return_address(0));
  msl::touch(to, long(n), true, __builtin_return_address(0));
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  msl::touch(to, long(n), true, __builtin_return_address(0));
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#pragma GCC visibility pop

extern "C" __attribute__((visibility("default"))) void watch_buffers(int n, const char** names, unsigned char** starts,
                                                                     const long* bytes, const int* are_outputs,
                                                                     unsigned char** were_read, void** shadows,
                                                                     unsigned char* start, unsigned char* stop) {
  msl::Watch& w = msl::watch;
  w.num_buffers = n;
  w.start = start;
  w.stop = stop;
  w.place = nullptr;
  for (int i = 0; i < n; i++)
    w.buffers[i] = {names[i], starts[i], bytes[i], are_outputs[i], were_read[i], (msl::Shadow*)shadows[i], 0, 0, 0, 0};
}
// loaded, requested, touched, written of each buffer; returns the instruction of the fault, from the library's start.
extern "C" __attribute__((visibility("default"))) void* watched(long* counts) {
  for (int i = 0; i < msl::watch.num_buffers; i++) {
    const msl::Buffer& b = msl::watch.buffers[i];
    counts[4 * i] = b.bytes_loaded;
    counts[4 * i + 1] = b.bytes_requested;
    counts[4 * i + 2] = b.bytes_touched;
    counts[4 * i + 3] = b.bytes_written;
  }
  return msl::watch.place;
}
extern "C" __attribute__((visibility("default"))) long shadow_bytes() { return sizeof(msl::Shadow); }
