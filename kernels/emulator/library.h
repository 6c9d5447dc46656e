// Metal's standard library as far as compute kernels use it: barriers, simdgroup collectives, mathematics, bits,
// relaxed atomics.
#pragma once
#include "dispatch.h"

#define kernel
#define device
#define constant
#define thread
// The word `threadgroup` becomes `static` where it declares storage (translate.py), and nothing before a pointer.
#define threadgroup
#define METAL_FUNC inline
#define MSL_LINE int line = __builtin_LINE()

namespace metal {
using msl::vec;
using bfloat = msl::bfloat;

template <class To, class From> To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline int msl_orders(mem_flags f) { return (int(f) & 2) >> 1 | (int(f) & 1) << 1; }
inline void threadgroup_barrier(mem_flags f, MSL_LINE) {
  msl::meet(msl::threadgroup_group, line, "threadgroup_barrier", msl_orders(f));
}
inline void simdgroup_barrier(mem_flags f, MSL_LINE) {
  msl::meet(msl::current->simdgroup->group, line, "simdgroup_barrier", msl_orders(f));
}

// A reduction by halves, as a simdgroup does it and a warp's butterfly too: a chain of 32 additions rounds worse.
#define MSL_REDUCTION(name, expression)                              \
  template <class T> T name(T v, MSL_LINE) {                         \
    auto lanes = msl::exchange(v, line, #name);                      \
    T all[msl::SIMD];                                                \
    for (int i = 0; i < lanes.n; i++) all[i] = lanes[i];             \
    for (int n = lanes.n; n > 1; n = (n + 1) / 2)                    \
      for (int i = 0; i + (n + 1) / 2 < n; i++) {                    \
        T a = all[i], b = all[i + (n + 1) / 2];                      \
        all[i] = T(expression);                                      \
      }                                                              \
    return all[0];                                                   \
  }
MSL_REDUCTION(simd_sum, a + b) MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_max, (b > a ? b : a)) MSL_REDUCTION(simd_min, (b < a ? b : a))
MSL_REDUCTION(simd_and, a & b) MSL_REDUCTION(simd_or, a | b) MSL_REDUCTION(simd_xor, a ^ b)
#undef MSL_REDUCTION

struct simd_vote {
  uint64_t votes;
  explicit operator uint64_t() const { return votes; }
};
inline simd_vote simd_ballot(bool v, MSL_LINE) {
  auto lanes = msl::exchange(v, line, "simd_ballot");
  uint64_t votes = 0;
  for (int i = 0; i < lanes.n; i++) votes |= uint64_t(lanes[i]) << i;
  return {votes};
}
inline bool simd_any(bool v, MSL_LINE) {
  auto lanes = msl::exchange(v, line, "simd_any");
  bool found = false;
  for (int i = 0; i < lanes.n; i++) found |= lanes[i];
  return found;
}
inline bool simd_all(bool v, MSL_LINE) {
  auto lanes = msl::exchange(v, line, "simd_all");
  bool found = true;
  for (int i = 0; i < lanes.n; i++) found &= lanes[i];
  return found;
}

#define MSL_LANE int(msl::current->lane)
#define MSL_SHUFFLE(name, argument, index)                       \
  template <class T> T name(T v, ushort argument, MSL_LINE) {    \
    auto lanes = msl::exchange(v, line, #name);                  \
    int i = index;                                               \
    return i >= 0 && i < lanes.n ? lanes[i] : v;                 \
  }
MSL_SHUFFLE(simd_shuffle, l, l) MSL_SHUFFLE(simd_broadcast, l, l) MSL_SHUFFLE(simd_shuffle_xor, m, MSL_LANE ^ m)
MSL_SHUFFLE(simd_shuffle_down, d, MSL_LANE + d) MSL_SHUFFLE(simd_shuffle_up, d, MSL_LANE - d)
MSL_SHUFFLE(simd_shuffle_rotate_down, d, (MSL_LANE + d) % lanes.n)
MSL_SHUFFLE(simd_shuffle_rotate_up, d, (MSL_LANE - d + lanes.n) % lanes.n)
MSL_SHUFFLE(quad_shuffle_xor, m, (MSL_LANE & ~3) | ((MSL_LANE ^ m) & 3))
MSL_SHUFFLE(quad_broadcast, l, (MSL_LANE & ~3) | l)
#undef MSL_SHUFFLE
template <class T> T simd_broadcast_first(T v, MSL_LINE) { return msl::exchange(v, line, "simd_broadcast_first")[0]; }
template <class T> T simd_prefix_inclusive_sum(T v, MSL_LINE) {
  auto lanes = msl::exchange(v, line, "simd_prefix_inclusive_sum");
  T sum = 0;
  for (int i = 0; i <= MSL_LANE; i++) sum += lanes[i];
  return sum;
}
template <class T> T simd_prefix_exclusive_sum(T v, MSL_LINE) {
  auto lanes = msl::exchange(v, line, "simd_prefix_exclusive_sum");
  T sum = 0;
  for (int i = 0; i < MSL_LANE; i++) sum += lanes[i];
  return sum;
}
template <class T> T quad_sum(T v, MSL_LINE) {
  auto lanes = msl::exchange(v, line, "quad_sum");
  T sum = 0;
  for (int i = 0; i < 4; i++) sum += lanes[(MSL_LANE & ~3) + i];
  return sum;
}
inline bool simd_is_first() { return MSL_LANE == 0; }
#undef MSL_LANE

#define MSL_FUNCTION(name)                                                \
  inline float name(float x) { return std::name(x); }                     \
  inline half name(half x) { return half(std::name(float(x))); }          \
  inline bfloat name(bfloat x) { return bfloat(std::name(float(x))); }    \
  template <int N> vec<float, N> name(vec<float, N> v) {                  \
    for (int i = 0; i < N; i++) v.d[i] = std::name(v.d[i]);               \
    return v;                                                             \
  }
MSL_FUNCTION(exp) MSL_FUNCTION(exp2) MSL_FUNCTION(log) MSL_FUNCTION(log2) MSL_FUNCTION(sqrt) MSL_FUNCTION(sin)
MSL_FUNCTION(cos) MSL_FUNCTION(tanh) MSL_FUNCTION(floor) MSL_FUNCTION(ceil) MSL_FUNCTION(round) MSL_FUNCTION(rint)
MSL_FUNCTION(trunc) MSL_FUNCTION(fabs)
#undef MSL_FUNCTION
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float pow(float a, float b) { return std::pow(a, b); }
inline float powr(float a, float b) { return std::pow(a, b); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline half fma(half a, half b, half c) {  // products of halves are exact in double; the sum may round twice in
  return half(std::fma(double(a), double(b), double(c)));  // theory: 53 bits hold it for all of half's range
}
template <class T> T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T clamp(T x, T a, T b) { return min(max(x, a), b); }
template <class T> T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> T dot(vec<T, N> a, vec<T, N> b) {
  T sum = 0;
  for (int i = 0; i < N; i++) sum += a.d[i] * b.d[i];
  return sum;
}
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline uint extract_bits(uint x, uint offset, uint n) {
  return n == 0 ? 0 : (x >> offset) & (n >= 32 ? ~0u : (1u << n) - 1);
}
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return std::isinf(x); }
template <class T> struct numeric_limits : std::numeric_limits<T> {};
template <> struct numeric_limits<half> {
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half max() { return half(65504.0f); }
  static constexpr half lowest() { return half(-65504.0f); }
};
namespace precise {
using metal::cos; using metal::exp; using metal::log; using metal::rsqrt; using metal::sin; using metal::sqrt; using metal::tanh;
}
namespace fast = precise;

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
#define MSL_ATOMIC(name, expression)                                                            \
  template <class T, class U> MSL_NO_SANITIZER T name(atomic<T>* p, U other, memory_order) {    \
    MSL_ACQUIRE(p);                                                                             \
    T b = T(other), a = p->value;                                                               \
    p->value = T(expression);                                                                   \
    MSL_RELEASE(p);                                                                             \
    return a;                                                                                   \
  }
MSL_ATOMIC(atomic_fetch_add_explicit, a + b) MSL_ATOMIC(atomic_fetch_sub_explicit, a - b)
MSL_ATOMIC(atomic_fetch_max_explicit, (b > a ? b : a)) MSL_ATOMIC(atomic_fetch_min_explicit, (b < a ? b : a))
MSL_ATOMIC(atomic_fetch_or_explicit, a | b) MSL_ATOMIC(atomic_exchange_explicit, b)
#undef MSL_ATOMIC
template <class T, class U> MSL_NO_SANITIZER void atomic_store_explicit(atomic<T>* p, U o, memory_order) { p->value = T(o); }
template <class T> MSL_NO_SANITIZER T atomic_load_explicit(const atomic<T>* p, memory_order) { return p->value; }

}  // namespace metal
