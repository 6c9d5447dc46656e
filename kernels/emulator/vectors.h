// Metal's vectors of two, three and four: components, the swizzles that are halves of a vector, element-wise
// arithmetic. A vector of three takes the room of four.
#pragma once
#include "numbers.h"

namespace msl {

template <class T, int N> struct vec;

template <class T> struct vec<T, 2> {
  union { T d[2]; struct { T x, y; }; };
  vec() = default;
  vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
  template <class U> explicit vec(vec<U, 2> o) : x(T(o.x)), y(T(o.y)) {}
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};

template <class T> struct vec<T, 3> {
  union { T d[4]; struct { T x, y, z, padding; }; vec<T, 2> xy; };
  vec() = default;
  vec(T a) : x(a), y(a), z(a) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <class U> explicit vec(vec<U, 3> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)) {}
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};

template <class T> struct vec<T, 4> {
  union { T d[4]; struct { T x, y, z, w; }; struct { vec<T, 2> xy, zw; }; };
  vec() = default;
  vec(T a) : x(a), y(a), z(a), w(a) {}
  vec(T a, T b, T c, T e) : x(a), y(b), z(c), w(e) {}
  vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  template <class U> explicit vec(vec<U, 4> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)), w(T(o.w)) {}
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};

#define MSL_OPERATOR(op)                                                                                 \
  template <class T, int N> vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                            \
    vec<T, N> r;                                                                                         \
    for (int i = 0; i < N; i++) r.d[i] = T(a.d[i] op b.d[i]);                                            \
    return r;                                                                                            \
  }                                                                                                      \
  template <class T, int N, class S, class = std::enable_if_t<std::is_convertible_v<S, T>>>              \
  vec<T, N> operator op(vec<T, N> a, S s) { return a op vec<T, N>(T(s)); }                               \
  template <class T, int N, class S, class = std::enable_if_t<std::is_convertible_v<S, T>>>              \
  vec<T, N> operator op(S s, vec<T, N> b) { return vec<T, N>(T(s)) op b; }                               \
  template <class T, int N, class S> vec<T, N>& operator op##=(vec<T, N>& a, S s) { return a = a op s; }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/) MSL_OPERATOR(%)
MSL_OPERATOR(&) MSL_OPERATOR(|) MSL_OPERATOR(^) MSL_OPERATOR(<<) MSL_OPERATOR(>>)
#undef MSL_OPERATOR

}  // namespace msl

#define MSL_VECTORS(T) \
  using T##2 = msl::vec<T, 2>; \
  using T##3 = msl::vec<T, 3>; \
  using T##4 = msl::vec<T, 4>;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(short) MSL_VECTORS(ushort)
MSL_VECTORS(char) MSL_VECTORS(uchar)
#undef MSL_VECTORS
