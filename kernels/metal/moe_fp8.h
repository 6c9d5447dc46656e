// Formats with floats of 8 bits, e4m3: the weights of mxfp8, whose scales are mxfp4's, and the scales of nvfp4, whose
// weights are mxfp4's in groups of 16. e4m3 is a sign, four bits of exponent and three of mantissa: the same bits in a
// half are 2^-8 of the value, zero and what is too small for a leading one included. Its NaN, of which `mx.quantize`
// writes none, is 480 here, as in MLX's own kernels.

enum { MOE_NVFP4 = 3, MOE_MXFP8 = 4 };

METAL_FUNC float moe_e4m3(uint sign, uint rest) {  // in the places that a half has them in
  return float(as_type<half>(ushort((sign & 0x8000u) | (rest & 0x3f80u))));
}

template <typename T>
struct MoeWeights<MOE_MXFP8, 8, T> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) {
    const uint four = w[first / 4];
    q[0] = moe_e4m3(four << 8, four << 7);
    q[1] = moe_e4m3(four, four >> 1);
    q[2] = moe_e4m3(four >> 8, four >> 9);
    q[3] = moe_e4m3(four >> 16, four >> 17);
  }
  static METAL_FUNC float offset(int, float, float bias) { return bias; }
};
template <typename T>
struct MoeWeights<MOE_NVFP4, 4, T> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) {
    MoeWeights<MOE_MXFP4, 4, T>::unpack(w, first, q);
  }
  static METAL_FUNC float offset(int, float, float bias) { return bias; }
};

template <typename S>
struct MoeScale<MOE_MXFP8, S> {  // a power of two; 2^8 as its weights are 2^-8 of theirs
  static METAL_FUNC float scale(const device S* p, int i) { return as_type<float>(uint(p[i]) << 23) * 256.0f; }
  static METAL_FUNC float bias(const device S* p, int i) { return 0.0f; }
};
template <typename S>
struct MoeScale<MOE_NVFP4, S> {  // 2^8 of its own, 2^14 as its weights are 2^-14 of theirs
  static METAL_FUNC float scale(const device S* p, int i) {
    return moe_e4m3(uint(p[i]) << 8, uint(p[i]) << 7) * 4194304.0f;
  }
  static METAL_FUNC float bias(const device S* p, int i) { return 0.0f; }
};
