// Every load and store of a kernel, seen: what it reads of each buffer, what lies outside, and threads that touch
// the same byte with no barrier between them. The compiler's own instrumentation for ThreadSanitizer calls
// watch.cpp here instead of that library, so that nothing has to be preloaded.
#pragma once
#include <unordered_map>
#include <unordered_set>
#include "dispatch.h"

namespace msl {

struct Access {  // who last read or wrote a byte, and when as barriers count
  int group = 0;
  uint thread = 0;
  uint64_t epoch = 0, simdgroup_epoch = 0;
  bool is_of_several = false, is_of_several_simdgroups = false;
};
struct Shadow { Access read, write; };

struct Buffer {
  const char* name;
  unsigned char* start;
  long bytes;
  int is_output;
  unsigned char* was_read;  // a flag for each byte
  Shadow* shadow;           // of outputs
  long bytes_loaded, bytes_requested, bytes_touched, bytes_written;
};
constexpr int MAX_BUFFERS = 64;

struct Watch {
  Buffer buffers[MAX_BUFFERS];
  int num_buffers = 0;
  unsigned char *start = nullptr, *stop = nullptr;  // what holds all buffers and the room between them
  Shadow* shadows[64] = {};                         // of the threadgroup variables
  // Of this threadgroup: how often each thread has come to each load, and what its simdgroup has asked for there.
  int group = 0;
  std::unordered_map<uint64_t, uint32_t> visits;
  std::unordered_set<uint64_t> requests;
  void* place = nullptr;                            // the instruction of the first fault
};
inline Watch watch;

}  // namespace msl
