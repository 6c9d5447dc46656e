// Metal Shading Language compute kernels as C++17 on a CPU (g++ or clang++).
#pragma once
#include "matrix.h"

using namespace metal;
using bfloat16_t = metal::bfloat;

template <class T, class U> T ceildiv(T n, U m) { return (n + m - 1) / m; }
template <class I = int64_t> I elem_to_loc(I element, const int* shape, const int64_t* strides, int ndim) {
  I place = 0;
  for (int i = ndim - 1; i >= 0 && element > 0; --i) {
    place += (element % shape[i]) * I(strides[i]);
    element /= shape[i];
  }
  return place;
}
