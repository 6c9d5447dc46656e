// simdgroup_matrix of 8x8: two elements a lane, where MLX's own kernels expect them (steel/gemm/mma.h, get_coord).
#pragma once
#include "library.h"

namespace metal {

template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup matrices are 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : elements(v) {}
  vec<T, 2>& thread_elements() { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;

// The lane's two elements are (row, column) and (row, column + 1).
inline void msl_place(int lane, int& row, int& column) {
  int quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  column = (quad & 2) * 2 + (lane % 2) * 2;
}
template <class T> simdgroup_matrix<T> make_filled_simdgroup_matrix(T v) { return simdgroup_matrix<T>(v); }

template <class T, class P>
void simdgroup_load(simdgroup_matrix<T>& m, const P* p, size_t stride = 8, vec<ulong, 2> origin = {0ul, 0ul},
                    bool is_transposed = false, MSL_LINE) {
  msl::meet(msl::current->simdgroup->group, line, "simdgroup_load");
  int r, c;
  msl_place(msl::current->lane, r, c);
  for (int k = 0; k < 2; k++)
    m.elements[k] = T(is_transposed ? p[(origin.x + c + k) * stride + origin.y + r]
                                    : p[(origin.y + r) * stride + origin.x + c + k]);
}

template <class T, class P>
void simdgroup_store(simdgroup_matrix<T> m, P* p, size_t stride = 8, vec<ulong, 2> origin = {0ul, 0ul},
                     bool is_transposed = false, MSL_LINE) {
  msl::meet(msl::current->simdgroup->group, line, "simdgroup_store");
  int r, c;
  msl_place(msl::current->lane, r, c);
  for (int k = 0; k < 2; k++)
    (is_transposed ? p[(origin.x + c + k) * stride + origin.y + r] : p[(origin.y + r) * stride + origin.x + c + k]) =
        P(m.elements[k]);
}

template <class D, class A, class B, class S>
void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                   simdgroup_matrix<S> sum, MSL_LINE) {
  struct Both { vec<A, 2> a; vec<B, 2> b; };
  auto lanes = msl::exchange(Both{a.elements, b.elements}, line, "simdgroup_multiply_accumulate");
  float left[8][8], right[8][8];
  int r, c;
  for (int lane = 0; lane < msl::SIMD; lane++) {
    msl_place(lane, r, c);
    Both both = lanes[lane];
    for (int k = 0; k < 2; k++) {
      left[r][c + k] = float(both.a[k]);
      right[r][c + k] = float(both.b[k]);
    }
  }
  msl_place(msl::current->lane, r, c);
  for (int k = 0; k < 2; k++) {
    float total = float(sum.elements[k]);
    for (int i = 0; i < 8; i++) total += left[r][i] * right[i][c + k];
    d.elements[k] = D(total);
  }
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D>(D(0)), line);
}

}  // namespace metal
