// Metal's names for clang's C++ for OpenCL, which keeps address spaces apart as Metal does: a device pointer is no
// threadgroup pointer, constant memory is not written, a threadgroup variable has no initialiser. Declarations
// only: nothing is compiled to code.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define kernel
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef half float16_t;

struct bfloat {
  ushort bits;
  bfloat() = default;
  bfloat(float);
  bfloat(const bfloat&) = default;
  bfloat(const __constant bfloat&);
  bfloat(const __global bfloat&);
  bfloat(const __local bfloat&);
  bfloat& operator=(const bfloat&) = default;
  void operator=(const bfloat&) __global;
  void operator=(const bfloat&) __local;
  operator float() const;
  operator float() const __global;
  operator float() const __constant;
  operator float() const __local;
};
typedef bfloat bfloat16_t;

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class To, class From> To as_type(From);
#define MSL_OF_ONE(name) template <class T> T name(T);
MSL_OF_ONE(simd_sum) MSL_OF_ONE(simd_product) MSL_OF_ONE(simd_max) MSL_OF_ONE(simd_min) MSL_OF_ONE(simd_and)
MSL_OF_ONE(simd_or) MSL_OF_ONE(simd_xor) MSL_OF_ONE(simd_broadcast_first) MSL_OF_ONE(simd_prefix_exclusive_sum)
MSL_OF_ONE(simd_prefix_inclusive_sum) MSL_OF_ONE(abs)
#define MSL_SHUFFLE(name) template <class T> T name(T, ushort);
MSL_SHUFFLE(simd_shuffle) MSL_SHUFFLE(simd_shuffle_xor) MSL_SHUFFLE(simd_shuffle_down) MSL_SHUFFLE(simd_shuffle_up)
MSL_SHUFFLE(simd_broadcast)
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
struct simd_vote { ulong votes; explicit operator ulong() const; };
simd_vote simd_ballot(bool);
#define MSL_FUNCTION(name) float name(float); half name(half);
MSL_FUNCTION(exp) MSL_FUNCTION(exp2) MSL_FUNCTION(log) MSL_FUNCTION(log2) MSL_FUNCTION(sqrt) MSL_FUNCTION(rsqrt)
MSL_FUNCTION(sin) MSL_FUNCTION(cos) MSL_FUNCTION(tanh) MSL_FUNCTION(floor) MSL_FUNCTION(ceil) MSL_FUNCTION(round)
MSL_FUNCTION(rint) MSL_FUNCTION(trunc) MSL_FUNCTION(fabs)
namespace precise { MSL_FUNCTION(exp) MSL_FUNCTION(log) MSL_FUNCTION(sqrt) MSL_FUNCTION(rsqrt) MSL_FUNCTION(tanh) }
namespace fast { MSL_FUNCTION(exp) MSL_FUNCTION(log) MSL_FUNCTION(sqrt) MSL_FUNCTION(rsqrt) MSL_FUNCTION(tanh) }
float pow(float, float);
float fma(float, float, float);
half fma(half, half, half);
template <class T> T max(T, T);
template <class T> T min(T, T);
template <class T> T clamp(T, T, T);
template <class T> T select(T, T, bool);
uint popcount(uint);
uint clz(uint);
uint ctz(uint);
uint mulhi(uint, uint);
uint extract_bits(uint, uint, uint);
bool isnan(float);
bool isinf(float);

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
#define MSL_ATOMIC(space)                                                                     \
  template <class T, class U> T atomic_fetch_add_explicit(space atomic<T>*, U, memory_order); \
  template <class T, class U> void atomic_store_explicit(space atomic<T>*, U, memory_order);  \
  template <class T> T atomic_load_explicit(const space atomic<T>*, memory_order);
MSL_ATOMIC(__global) MSL_ATOMIC(__local)

template <class T, int R, int C> struct simdgroup_matrix { T elements[2]; };
template <class T> simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T);
#define MSL_MATRIX(space)                                                                                      \
  template <class T, class P> void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const space P*, ulong stride = 8); \
  template <class T, class P> void simdgroup_store(simdgroup_matrix<T, 8, 8>, space P*, ulong stride = 8);
MSL_MATRIX(__global) MSL_MATRIX(__local)
template <class D, class A, class B, class S>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<S, 8, 8>);
}  // namespace metal
using namespace metal;
