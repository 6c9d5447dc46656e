// Metal's scalars: half is the compiler's own _Float16, bfloat rounds after every operation as Metal's does.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using uint = uint32_t;
using ushort = uint16_t;
using uchar = uint8_t;
using ulong = uint64_t;
using half = _Float16;
using float16_t = half;

namespace msl {

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T> || std::is_same_v<T, half>>>
  constexpr bfloat(T value) : bits(round(float(value))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

 private:
  static constexpr uint16_t round(float value) {  // to nearest, ties to even
    uint32_t u = __builtin_bit_cast(uint32_t, value);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

template <class T>
constexpr bool is_integer = std::is_integral_v<T>;
#define MSL_OPERATOR(op)                                                                  \
  inline bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }  \
  inline float operator op(bfloat a, float b) { return float(a) op b; }                   \
  inline float operator op(float a, bfloat b) { return a op float(b); }                   \
  template <class T, class = std::enable_if_t<is_integer<T>>>                             \
  bfloat operator op(bfloat a, T b) { return bfloat(float(a) op float(b)); }              \
  template <class T, class = std::enable_if_t<is_integer<T>>>                             \
  bfloat operator op(T a, bfloat b) { return bfloat(float(a) op float(b)); }              \
  template <class T>                                                                      \
  bfloat& operator op##=(bfloat& a, T b) { return a = bfloat(float(a) op float(b)); }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
#undef MSL_OPERATOR

}  // namespace msl
