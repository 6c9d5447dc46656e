// The weights of experts from their packed words, in the formats of MLX. A lane takes C weights of a row at a time,
// whole words of one group; four of them at a time become floats, as scale * q + bias.

enum { MOE_AFFINE = 0, MOE_MXFP4 = 1, MOE_PLAIN = 2 };
enum { MOE_SWIGLU = 0, MOE_GEGLU = 1, MOE_SWIGLU_OAI = 2, MOE_SWIGLU_CLAMPED = 3, MOE_SWIGLU_CLAMPED_AFTER = 4 };
enum { MOE_SIMD = 32, MOE_SUMS = 16 };  // MOE_SUMS: of one matrix that a lane holds

// ---- four numbers of type T out of 32-bit words ---------------------------------------------------------------
template <typename T>
struct MoeFour;
template <>
struct MoeFour<float> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* v) {
    for (int i = 0; i < 4; i++) v[i] = as_type<float>(w[first + i]);
  }
};
template <>
struct MoeFour<bfloat16_t> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* v) {
    for (int i = 0; i < 2; i++) {
      v[2 * i] = as_type<float>(w[first / 2 + i] << 16);
      v[2 * i + 1] = as_type<float>(w[first / 2 + i] & 0xffff0000u);
    }
  }
};
template <>
struct MoeFour<half> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* v) {
    for (int i = 0; i < 2; i++) {
      v[2 * i] = float(as_type<half>(ushort(w[first / 2 + i] & 0xffffu)));
      v[2 * i + 1] = float(as_type<half>(ushort(w[first / 2 + i] >> 16)));
    }
  }
};

// ---- four quantised weights, as whole numbers (affine) or as 2^-14 of their value (mxfp4) ---------------------
// Affine weights are one stream of bits, least significant first. A field is moved into the mantissa of a power of
// two, which makes 2^n + q with two logical operations instead of a conversion, which is slow on Apple's GPUs. Fields
// that share out a word (2, 4 and 8 bits) are moved behind the mantissa's first bit, as many at a time as keep n at 8 or
// less, and 2^n leaves with the bias (`offset`). The others stay where they are, or are shifted by 16 where they lie
// above bit 22, and the power is subtracted: exact.
template <int MODE, int BITS, typename T>
struct MoeWeights {
  enum { IS_EVEN = 32 % BITS == 0, TOGETHER = BITS < 8 ? 8 / BITS : 1 };
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int bit = (first + i) * BITS, word = bit / 32, offset = bit % 32;
      uint field = w[word];
      if (IS_EVEN) {
        const int at = 23 - BITS * (TOGETHER - (first + i) % TOGETHER);
        field = at > offset ? field << (at > offset ? at - offset : 0) : field >> (at > offset ? 0 : offset - at);
        q[i] = as_type<float>((field & (((1u << BITS) - 1u) << at)) | uint(150 - at) << 23);
      } else {
        const bool is_low = offset + BITS <= 23;
        if (!is_low) {
          field >>= 16;
          if (offset + BITS > 32) field |= w[word + 1] << 16;
        }
        const int at = is_low ? offset : offset - 16;
        const uint power = uint(150 - at) << 23;
        q[i] = as_type<float>((field & (((1u << BITS) - 1u) << at)) | power) - as_type<float>(power);
      }
    }
  }
  // what is added to scale * unpack's weight i
  static METAL_FUNC float offset(int i, float scale, float bias) {
    if (!IS_EVEN) return bias;
    return metal::fma(-float(1 << (BITS * (TOGETHER - i % TOGETHER))), scale, bias);
  }
};
// mxfp4: sign, two bits of exponent, one of mantissa. The same bits in a half are 2^-14 of the value, zero and the
// half step included.
template <typename T>
struct MoeWeights<MOE_MXFP4, 4, T> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) {
    const uint four = w[first / 8] >> (first % 8 * 4);
    q[0] = float(as_type<half>(ushort(((four << 12) & 0x8000u) | ((four << 9) & 0x0e00u))));
    q[1] = float(as_type<half>(ushort(((four << 8) & 0x8000u) | ((four << 5) & 0x0e00u))));
    q[2] = float(as_type<half>(ushort(((four << 4) & 0x8000u) | ((four << 1) & 0x0e00u))));
    q[3] = float(as_type<half>(ushort((four & 0x8000u) | ((four >> 3) & 0x0e00u))));
  }
  static METAL_FUNC float offset(int, float, float bias) { return bias; }
};
template <int BITS, typename T>
struct MoeWeights<MOE_PLAIN, BITS, T> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) { MoeFour<T>::unpack(w, first, q); }
  static METAL_FUNC float offset(int, float, float bias) { return bias; }
};

// ---- scales ---------------------------------------------------------------------------------------------------
template <int MODE, typename S>
struct MoeScale {
  static METAL_FUNC float scale(const device S* p, int i) { return float(p[i]); }
  static METAL_FUNC float bias(const device S* p, int i) { return float(p[i]); }
};
template <typename S>
struct MoeScale<MOE_MXFP4, S> {  // a power of two; 2^14 as its weights are 2^-14 of theirs
  static METAL_FUNC float scale(const device S* p, int i) { return as_type<float>(uint(p[i]) << 23) * 16384.0f; }
  static METAL_FUNC float bias(const device S* p, int i) { return 0.0f; }
};
template <typename S>
struct MoeScale<MOE_PLAIN, S> {
  static METAL_FUNC float scale(const device S* p, int i) { return 1.0f; }
  static METAL_FUNC float bias(const device S* p, int i) { return 0.0f; }
};

template <int N>
METAL_FUNC void moe_words(const device uint* p, thread uint* w) {  // N words by the widest loads that fit
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      uint4 v = ((const device uint4*)p)[i];
      w[4 * i] = v.x;
      w[4 * i + 1] = v.y;
      w[4 * i + 2] = v.z;
      w[4 * i + 3] = v.w;
    }
  } else if (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      uint2 v = ((const device uint2*)p)[i];
      w[2 * i] = v.x;
      w[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = p[i];
  }
}

// ---- rows of one matrix of every expert -----------------------------------------------------------------------
// (E, N, K) in words of 32 bits, scales and biases (E, N, K / GROUP). BITS of a plain weight: 16 or 32.
template <int MODE, int BITS, int GROUP, int N, int K, int C, typename S, typename T>
struct MoeMatrix {
  enum { ROW_WORDS = K * BITS / 32, CHUNK_WORDS = C * BITS / 32, CHUNKS = K / C, NUM_ROWS = N };
  enum { ROW_GROUPS = GROUP > 0 ? K / GROUP : 1, CHUNKS_IN_GROUP = GROUP > 0 ? GROUP / C : K / C };
  const device uint* weight;
  const device S* scales;
  const device S* biases;

  template <int ROWS>
  METAL_FUNC void load(ulong expert, uint first_row, uint chunk, thread uint* w, thread float* s, thread float* b) const {
    const ulong first = expert * N + first_row;
    const device uint* words = weight + first * ROW_WORDS + chunk * CHUNK_WORDS;
    const ulong group = first * ROW_GROUPS + chunk / CHUNKS_IN_GROUP;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      // behind the last row: that row again, which nobody writes down
      const int row = N % ROWS == 0 ? r : int(metal::min(first_row + uint(r), uint(N - 1))) - int(first_row);
      moe_words<CHUNK_WORDS>(words + row * ROW_WORDS, w + r * CHUNK_WORDS);
      s[r] = MoeScale<MODE, S>::scale(scales + group, row * ROW_GROUPS);
      b[r] = MoeScale<MODE, S>::bias(biases + group, row * ROW_GROUPS);
    }
  }
  static METAL_FUNC void four(const thread uint* w, float s, float b, int first, thread float* v) {
    MoeWeights<MODE, BITS, T>::unpack(w, first, v);
    if (MODE != MOE_PLAIN) {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = metal::fma(v[i], s, MoeWeights<MODE, BITS, T>::offset(first + i, s, b));
    }
  }
};
