// Metal's names for a CUDA compiler: a simdgroup is a warp, a threadgroup is a block. NVRTC compiles it, so that
// nothing of the host's libraries may be included.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/cstdint>

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;
using float16_t = __half;
using bfloat16_t = __nv_bfloat16;
using bfloat = __nv_bfloat16;
#define METAL_FUNC __device__ inline

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
METAL_FUNC void threadgroup_barrier(mem_flags flags) {
  if (int(flags) & 1) __threadfence();
  __syncthreads();
}
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

#define MSL_ALL 0xffffffffu
#define MSL_REDUCTION(name, expression)                           \
  template <class T> METAL_FUNC T name(T a) {                     \
    for (int offset = 16; offset; offset >>= 1) {                 \
      T b = __shfl_xor_sync(MSL_ALL, a, offset);                  \
      a = T(expression);                                          \
    }                                                             \
    return a;                                                     \
  }
MSL_REDUCTION(simd_sum, a + b) MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_max, (b > a ? b : a)) MSL_REDUCTION(simd_min, (b < a ? b : a))
MSL_REDUCTION(simd_and, a & b) MSL_REDUCTION(simd_or, a | b) MSL_REDUCTION(simd_xor, a ^ b)
#undef MSL_REDUCTION
METAL_FUNC bool simd_any(bool v) { return __any_sync(MSL_ALL, v); }
METAL_FUNC bool simd_all(bool v) { return __all_sync(MSL_ALL, v); }
METAL_FUNC uint64_t simd_ballot(bool v) { return __ballot_sync(MSL_ALL, v); }
template <class T> METAL_FUNC T simd_shuffle(T v, ushort lane) { return __shfl_sync(MSL_ALL, v, lane); }
template <class T> METAL_FUNC T simd_broadcast(T v, ushort lane) { return __shfl_sync(MSL_ALL, v, lane); }
template <class T> METAL_FUNC T simd_broadcast_first(T v) { return __shfl_sync(MSL_ALL, v, 0); }
template <class T> METAL_FUNC T simd_shuffle_xor(T v, ushort mask) { return __shfl_xor_sync(MSL_ALL, v, mask); }
template <class T> METAL_FUNC T simd_shuffle_down(T v, ushort n) { return __shfl_down_sync(MSL_ALL, v, n); }
template <class T> METAL_FUNC T simd_shuffle_up(T v, ushort n) { return __shfl_up_sync(MSL_ALL, v, n); }
METAL_FUNC uint msl_lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
METAL_FUNC bool simd_is_first() { return msl_lane() == 0; }
template <class T> METAL_FUNC T simd_prefix_inclusive_sum(T v) {
  for (int n = 1; n < 32; n <<= 1) {
    T before = __shfl_up_sync(MSL_ALL, v, n);
    if (msl_lane() >= uint(n)) v += before;
  }
  return v;
}
template <class T> METAL_FUNC T simd_prefix_exclusive_sum(T v) {
  T before = __shfl_up_sync(MSL_ALL, simd_prefix_inclusive_sum(v), 1);
  return msl_lane() == 0 ? T(0) : before;
}

#define MSL_FUNCTION(name, of_cuda) \
  METAL_FUNC float name(float x) { return ::of_cuda(x); }
MSL_FUNCTION(exp, expf) MSL_FUNCTION(exp2, exp2f) MSL_FUNCTION(log, logf) MSL_FUNCTION(log2, log2f)
MSL_FUNCTION(sqrt, sqrtf) MSL_FUNCTION(rsqrt, rsqrtf) MSL_FUNCTION(sin, sinf) MSL_FUNCTION(cos, cosf)
MSL_FUNCTION(tanh, tanhf) MSL_FUNCTION(floor, floorf) MSL_FUNCTION(ceil, ceilf) MSL_FUNCTION(round, roundf)
MSL_FUNCTION(rint, rintf) MSL_FUNCTION(trunc, truncf) MSL_FUNCTION(fabs, fabsf)
#undef MSL_FUNCTION
namespace precise {
using metal::cos; using metal::exp; using metal::log; using metal::rsqrt; using metal::sin; using metal::sqrt; using metal::tanh;
}
namespace fast = precise;
METAL_FUNC float pow(float a, float b) { return ::powf(a, b); }
METAL_FUNC float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return __hfma(a, b, c); }
template <class T> METAL_FUNC T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> METAL_FUNC T max(T a, T b) { return a < b ? b : a; }
template <class T> METAL_FUNC T min(T a, T b) { return b < a ? b : a; }
template <class T> METAL_FUNC T clamp(T x, T a, T b) { return metal::min(metal::max(x, a), b); }
template <class T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class To, class From> METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
METAL_FUNC uint popcount(uint x) { return __popc(x); }
METAL_FUNC uint clz(uint x) { return __clz(x); }
METAL_FUNC uint ctz(uint x) { return x ? __ffs(x) - 1 : 32; }
METAL_FUNC uint mulhi(uint a, uint b) { return __umulhi(a, b); }
METAL_FUNC uint extract_bits(uint x, uint offset, uint n) {
  return n == 0 ? 0 : (x >> offset) & (n >= 32 ? ~0u : (1u << n) - 1);
}
METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isinf(float x) { return metal::fabs(x) == __int_as_float(0x7f800000); }

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
template <class T, class U> METAL_FUNC T atomic_fetch_add_explicit(atomic<T>* p, U v, memory_order) {
  return atomicAdd(&p->value, T(v));
}
template <class T, class U> METAL_FUNC void atomic_store_explicit(atomic<T>* p, U v, memory_order) {
  *(volatile T*)&p->value = T(v);
}
template <class T> METAL_FUNC T atomic_load_explicit(const atomic<T>* p, memory_order) {
  return *(const volatile T*)&p->value;
}

// simdgroup_matrix of 8x8 in the lanes that MLX's own kernels expect; products by shuffles: right, not fast.
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  T elements[2];
  METAL_FUNC simdgroup_matrix() {}
  METAL_FUNC explicit simdgroup_matrix(T v) { elements[0] = elements[1] = v; }
};
METAL_FUNC void msl_place(int lane, int& row, int& column) {
  int quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  column = (quad & 2) * 2 + (lane % 2) * 2;
}
METAL_FUNC int msl_lane_of(int r, int c) { return ((r & 4) << 2) | ((c & 4) << 1) | ((r & 3) << 1) | ((c >> 1) & 1); }
template <class T> METAL_FUNC simdgroup_matrix<T> make_filled_simdgroup_matrix(T v) { return simdgroup_matrix<T>(v); }
template <class T, class P> METAL_FUNC void simdgroup_load(simdgroup_matrix<T>& m, const P* p, size_t stride = 8) {
  int r, c;
  msl_place(msl_lane(), r, c);
  for (int k = 0; k < 2; k++) m.elements[k] = T(p[r * stride + c + k]);
}
template <class T, class P> METAL_FUNC void simdgroup_store(simdgroup_matrix<T> m, P* p, size_t stride = 8) {
  int r, c;
  msl_place(msl_lane(), r, c);
  for (int k = 0; k < 2; k++) p[r * stride + c + k] = P(m.elements[k]);
  __syncwarp();
}
template <class D, class A, class B, class S>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                              simdgroup_matrix<S> sum) {
  int r, c;
  msl_place(msl_lane(), r, c);
  float total[2] = {float(sum.elements[0]), float(sum.elements[1])};
  for (int i = 0; i < 8; i++) {
    int left = msl_lane_of(r, i), right = msl_lane_of(i, c);
    float a0 = __shfl_sync(MSL_ALL, float(a.elements[0]), left), a1 = __shfl_sync(MSL_ALL, float(a.elements[1]), left);
    for (int k = 0; k < 2; k++)
      total[k] += (i & 1 ? a1 : a0) * __shfl_sync(MSL_ALL, float(b.elements[k]), right);
  }
  d.elements[0] = D(total[0]);
  d.elements[1] = D(total[1]);
}

}  // namespace metal
using namespace metal;
