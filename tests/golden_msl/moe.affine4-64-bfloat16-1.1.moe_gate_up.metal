// The weights of experts from their packed words, in the formats of MLX. A lane takes C weights of a row at a time,
// whole words of one group; four of them at a time become floats, as scale * q + bias.

enum { MOE_AFFINE = 0, MOE_MXFP4 = 1, MOE_PLAIN = 2 };
enum { MOE_SWIGLU = 0, MOE_GEGLU = 1, MOE_SWIGLU_OAI = 2, MOE_SWIGLU_CLAMPED = 3, MOE_SWIGLU_CLAMPED_AFTER = 4 };
enum { MOE_SIMD = 32, MOE_ROWS = 4 };

// ---- four numbers of type T out of 32-bit words ---------------------------------------------------------------
template <typename T>
struct MoeFour;
template <>
struct MoeFour<float> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* v) {
    for (int i = 0; i < 4; i++) v[i] = as_type<float>(w[first + i]);
  }
  static METAL_FUNC void load(const device float* p, thread float* v) {
    uint4 w = ((const device uint4*)p)[0];
    v[0] = as_type<float>(w.x);
    v[1] = as_type<float>(w.y);
    v[2] = as_type<float>(w.z);
    v[3] = as_type<float>(w.w);
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
  static METAL_FUNC void load(const device bfloat16_t* p, thread float* v) {
    uint2 pair = ((const device uint2*)p)[0];
    uint w[2] = {pair.x, pair.y};
    unpack(w, 0, v);
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
  static METAL_FUNC void load(const device half* p, thread float* v) {
    uint2 pair = ((const device uint2*)p)[0];
    uint w[2] = {pair.x, pair.y};
    unpack(w, 0, v);
  }
};

// ---- four quantised weights, as whole numbers (affine) or as 2^-14 of their value (mxfp4) ---------------------
// Affine weights are one stream of bits, least significant first. A field is moved into the mantissa of a power of
// two whose last place is the field's own, which makes 2^n + q: two logical operations and a subtraction, exact,
// instead of a shift and a conversion, which are slow on Apple's GPUs. Fields above bit 22 are shifted by 16 first,
// once for a word.
template <int MODE, int BITS, typename T>
struct MoeWeights {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int bit = (first + i) * BITS, word = bit / 32, offset = bit % 32;
      const bool is_low = offset + BITS <= 23;
      uint field = w[word];
      if (!is_low) {
        field >>= 16;
        if (offset + BITS > 32) field |= w[word + 1] << 16;
      }
      const int at = is_low ? offset : offset - 16;
      const uint power = uint(150 - at) << 23;
      q[i] = as_type<float>((field & (((1u << BITS) - 1u) << at)) | power) - as_type<float>(power);
    }
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
};
template <int BITS, typename T>
struct MoeWeights<MOE_PLAIN, BITS, T> {
  static METAL_FUNC void unpack(const thread uint* w, int first, thread float* q) { MoeFour<T>::unpack(w, first, q); }
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
      const int row = N % MOE_ROWS == 0 ? r : int(metal::min(first_row + uint(r), uint(N - 1))) - int(first_row);
      moe_words<CHUNK_WORDS>(words + row * ROW_WORDS, w + r * CHUNK_WORDS);
      s[r] = MoeScale<MODE, S>::scale(scales + group, row * ROW_GROUPS);
      b[r] = MoeScale<MODE, S>::bias(biases + group, row * ROW_GROUPS);
    }
  }
  static METAL_FUNC void four(const thread uint* w, float s, float b, int first, thread float* v) {
    MoeWeights<MODE, BITS, T>::unpack(w, first, v);
    if (MODE != MOE_PLAIN) {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = metal::fma(v[i], s, b);
    }
  }
};
// What the kernels of a block of experts share: dot products of a few rows with a few tokens, their sums over the
// lanes, activations. A simdgroup makes ROWS rows for TOKENS tokens; each weight becomes a float once and meets
// every token. Sums are float32, in an order that depends on C alone: a token's answer has the same bits in any
// company.

// sums[token * ROWS + row] += row . x[token], for one chunk
template <int ROWS, int TOKENS, int C, typename T, typename M>
METAL_FUNC void moe_dot_chunk(
    M m, ulong expert, uint first_row, const device T* x, const thread uint* at, uint chunk, thread float* sums) {
  uint w[ROWS * M::CHUNK_WORDS];
  float s[ROWS], b[ROWS];
  m.template load<ROWS>(expert, first_row, chunk, w, s, b);
#pragma unroll
  for (int first = 0; first < C; first += 4) {
    float v[ROWS * 4];
#pragma unroll
    for (int r = 0; r < ROWS; r++) M::four(w + r * M::CHUNK_WORDS, s[r], b[r], first, v + 4 * r);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float y[4];
      MoeFour<T>::load(x + (at[t] * (M::CHUNKS * C) + chunk * C + first), y);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[t * ROWS + r] = metal::fma(y[i], v[4 * r + i], sums[t * ROWS + r]);
      }
    }
  }
}

// The same for two matrices, so that x is read once.
template <int ROWS, int TOKENS, int C, typename T, typename G, typename U>
METAL_FUNC void moe_dot_two_chunk(
    G gate, U up, ulong expert, uint first_row, const device T* x, const thread uint* at, uint chunk,
    thread float* gates, thread float* ups) {
  uint wg[ROWS * G::CHUNK_WORDS], wu[ROWS * U::CHUNK_WORDS];
  float sg[ROWS], bg[ROWS], su[ROWS], bu[ROWS];
  gate.template load<ROWS>(expert, first_row, chunk, wg, sg, bg);
  up.template load<ROWS>(expert, first_row, chunk, wu, su, bu);
#pragma unroll
  for (int first = 0; first < C; first += 4) {
    float vg[ROWS * 4], vu[ROWS * 4];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      G::four(wg + r * G::CHUNK_WORDS, sg[r], bg[r], first, vg + 4 * r);
      U::four(wu + r * U::CHUNK_WORDS, su[r], bu[r], first, vu + 4 * r);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float y[4];
      MoeFour<T>::load(x + (at[t] * (G::CHUNKS * C) + chunk * C + first), y);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          gates[t * ROWS + r] = metal::fma(y[i], vg[4 * r + i], gates[t * ROWS + r]);
          ups[t * ROWS + r] = metal::fma(y[i], vu[4 * r + i], ups[t * ROWS + r]);
        }
      }
    }
  }
}

// Sums of N values over the lanes, N a power of two up to 32: lane l is left with value l / (32 / N). Each exchange
// halves what a lane holds, so that 32 sums take 31 exchanges; the tree of additions is the same for every N.
template <int N, int OFFSET>
struct MoeFold {
  static METAL_FUNC void run(thread float* v, uint lane) {
    if (N > 1) {
      const bool is_upper = (lane & OFFSET) != 0;
#pragma unroll
      for (int i = 0; i < N / 2; i++) {
        const float keep = is_upper ? v[i + N / 2] : v[i];
        const float give = is_upper ? v[i] : v[i + N / 2];
        v[i] = keep + simd_shuffle_xor(give, ushort(OFFSET));
      }
    } else {
      v[0] = v[0] + simd_shuffle_xor(v[0], ushort(OFFSET));
    }
    MoeFold<(N > 1 ? N / 2 : 1), OFFSET / 2>::run(v, lane);
  }
};
template <int N>
struct MoeFold<N, 0> {
  static METAL_FUNC void run(thread float* v, uint lane) {}
};

template <int ACTIVATION>
METAL_FUNC float moe_activate(float gate, float up, float alpha, float limit) {
  if (ACTIVATION == MOE_GEGLU) {  // g * (1 + tanh(z)) / 2 = g / (1 + exp(-2 z))
    const float z = 0.7978845608028654f * metal::fma(0.044715f * gate * gate, gate, gate);
    return gate / (1.0f + metal::exp(-2.0f * z)) * up;
  }
  if (ACTIVATION == MOE_SWIGLU_OAI || ACTIVATION == MOE_SWIGLU_CLAMPED) gate = metal::min(gate, limit);
  if (ACTIVATION >= MOE_SWIGLU_OAI) up = metal::min(metal::max(up, -limit), limit);
  if (ACTIVATION == MOE_SWIGLU_OAI) return gate / (1.0f + metal::exp(-alpha * gate)) * (up + 1.0f);
  float silu = gate / (1.0f + metal::exp(-gate));
  if (ACTIVATION == MOE_SWIGLU_CLAMPED_AFTER) silu = metal::min(silu, limit);
  return silu * up;
}

// Which of the folded values a lane holds.
template <int ROWS, int TOKENS>
struct MoeLane {
  uint token, row;
  bool is_first;  // of the lanes that hold it
  METAL_FUNC MoeLane(uint lane) {
    const uint mine = lane / (MOE_SIMD / (ROWS * TOKENS));
    token = mine / ROWS;
    row = mine % ROWS;
    is_first = lane % (MOE_SIMD / (ROWS * TOKENS)) == 0;
  }
};

// ROWS rows for the rows `at` of x, over all chunks and lanes: what MoeLane says, in this lane.
template <int ROWS, int TOKENS, int C, typename T, typename M>
METAL_FUNC float moe_sums(M m, ulong expert, uint first_row, const device T* x, const thread uint* at, uint lane) {
  float sums[ROWS * TOKENS];
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = 0.0f;
  for (uint chunk = lane; chunk < uint(M::CHUNKS); chunk += MOE_SIMD) {
    moe_dot_chunk<ROWS, TOKENS, C, T>(m, expert, first_row, x, at, chunk, sums);
  }
  MoeFold<ROWS * TOKENS, 16>::run(sums, lane);
  return sums[0];
}
// Gate and up together while their sums fit into the registers, else one after the other.
template <int ROWS, int TOKENS, int C, typename T, typename G, typename U>
METAL_FUNC void moe_gate_up_sums(
    G gate, U up, ulong expert, uint first_row, const device T* x, const thread uint* at, uint lane,
    thread float& gate_sum, thread float& up_sum) {
  if (ROWS * TOKENS > 16) {
    gate_sum = moe_sums<ROWS, TOKENS, C, T>(gate, expert, first_row, x, at, lane);
    up_sum = moe_sums<ROWS, TOKENS, C, T>(up, expert, first_row, x, at, lane);
    return;
  }
  float gates[ROWS * TOKENS], ups[ROWS * TOKENS];
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) gates[i] = ups[i] = 0.0f;
  for (uint chunk = lane; chunk < uint(G::CHUNKS); chunk += MOE_SIMD) {
    moe_dot_two_chunk<ROWS, TOKENS, C, T>(gate, up, expert, first_row, x, at, chunk, gates, ups);
  }
  MoeFold<ROWS * TOKENS, 16>::run(gates, lane);
  MoeFold<ROWS * TOKENS, 16>::run(ups, lane);
  gate_sum = gates[0];
  up_sum = ups[0];
}

// ---- one token: MOE_ROWS rows of one expert -------------------------------------------------------------------
template <int C, int ACTIVATION, typename T, typename G, typename U, typename GB, typename UB>
METAL_FUNC void moe_gate_up_one(
    G gate, U up, const device GB* gate_bias, const device UB* up_bias, bool gate_biased, bool up_biased,
    ulong expert, uint first_row, const device T* x, uint lane, float alpha, float limit, device T* inner) {
  const uint at[1] = {0};
  const MoeLane<MOE_ROWS, 1> mine(lane);
  float g, u;
  moe_gate_up_sums<MOE_ROWS, 1, C, T>(gate, up, expert, first_row, x, at, lane, g, u);
  const uint row = first_row + mine.row;
  if (mine.is_first && row < uint(G::NUM_ROWS)) {
    if (gate_biased) g += float(gate_bias[expert * G::NUM_ROWS + row]);
    if (up_biased) u += float(up_bias[expert * G::NUM_ROWS + row]);
    inner[row] = T(moe_activate<ACTIVATION>(g, u, alpha, limit));
  }
}
template <int C, typename T, typename D, typename B>
METAL_FUNC void moe_down_one(
    D down, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* inner, uint lane,
    threadgroup float* answers) {
  const uint at[1] = {0};
  const MoeLane<MOE_ROWS, 1> mine(lane);
  float sum = moe_sums<MOE_ROWS, 1, C, T>(down, expert, first_row, inner, at, lane);
  const uint row = first_row + mine.row;
  if (mine.is_first && row < uint(D::NUM_ROWS)) {
    if (is_biased) sum += float(bias[expert * D::NUM_ROWS + row]);
    answers[mine.row] = sum;
  }
}

// ---- a tile: MOE_ROWS rows of one expert for up to TILE of its pairs -------------------------------------------
// A pair is a token's choice of an expert. A tile takes TOKENS places, as many as it needs in powers of two (behind
// its last pair they hold that pair again, which is not written), and ROWS rows at a time, as many as the registers
// hold: a kernel takes as many for all its threads as its greediest path. Weights are read once in any case.
template <int ROWS, int TOKENS, int C, int ACTIVATION, typename T, typename G, typename U, typename GB, typename UB>
METAL_FUNC void moe_gate_up_tile(
    G gate, U up, const device GB* gate_bias, const device UB* up_bias, bool gate_biased, bool up_biased,
    ulong expert, uint first_row, const device T* x, uint choices, const device uint* order, uint count, uint lane,
    float alpha, float limit, device T* inner) {
  uint at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) at[t] = order[metal::min(uint(t), count - 1)] / choices;
  const MoeLane<ROWS, TOKENS> mine(lane);
  for (int part = 0; part < MOE_ROWS; part += ROWS) {
    float g, u;
    moe_gate_up_sums<ROWS, TOKENS, C, T>(gate, up, expert, first_row + part, x, at, lane, g, u);
    const uint row = first_row + part + mine.row;
    if (mine.is_first && mine.token < count && row < uint(G::NUM_ROWS)) {
      if (gate_biased) g += float(gate_bias[expert * G::NUM_ROWS + row]);
      if (up_biased) u += float(up_bias[expert * G::NUM_ROWS + row]);
      inner[ulong(order[mine.token]) * G::NUM_ROWS + row] = T(moe_activate<ACTIVATION>(g, u, alpha, limit));
    }
  }
}
// The answers without their scores: answers[pair * MOE_ROWS + row - first_row].
template <int ROWS, int TOKENS, int C, typename T, typename D, typename B>
METAL_FUNC void moe_down_tile(
    D down, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* inner,
    const device uint* order, uint count, uint lane, threadgroup float* answers) {
  uint at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) at[t] = order[metal::min(uint(t), count - 1)];
  const MoeLane<ROWS, TOKENS> mine(lane);
  for (int part = 0; part < MOE_ROWS; part += ROWS) {
    float sum = moe_sums<ROWS, TOKENS, C, T>(down, expert, first_row + part, inner, at, lane);
    const uint row = first_row + part + mine.row;
    if (mine.is_first && mine.token < count && row < uint(D::NUM_ROWS)) {
      if (is_biased) sum += float(bias[expert * D::NUM_ROWS + row]);
      answers[order[mine.token] * MOE_ROWS + part + mine.row] = sum;
    }
  }
}

#define MOE_BY_COUNT(CALL)  /* ROWS, TOKENS */ \
  if (count == 1) {                            \
    CALL(4, 1);                                \
  } else if (count == 2) {                     \
    CALL(4, 2);                                \
  } else if (count <= 4) {                     \
    CALL(4, 4);                                \
  } else if (count <= 8) {                     \
    CALL(2, 8);                                \
  } else if (count <= 16 || TILE <= 16) {      \
    CALL(1, 16);                               \
  } else {                                     \
    CALL(1, (TILE > 16 ? 32 : 16));            \
  }
template <int TILE, int C, int ACTIVATION, typename T, typename G, typename U, typename GB, typename UB>
METAL_FUNC void moe_gate_up_any(
    G gate, U up, const device GB* gate_bias, const device UB* up_bias, bool gate_biased, bool up_biased,
    ulong expert, uint first_row, const device T* x, uint choices, const device uint* order, uint count, uint lane,
    float alpha, float limit, device T* inner) {
#define MOE_CALL(ROWS, TOKENS)                                                                                        \
  moe_gate_up_tile<ROWS, TOKENS, C, ACTIVATION, T>(                                                                   \
      gate, up, gate_bias, up_bias, gate_biased, up_biased, expert, first_row, x, choices, order, count, lane, alpha, \
      limit, inner)
  MOE_BY_COUNT(MOE_CALL)
#undef MOE_CALL
}
template <int TILE, int C, typename T, typename D, typename B>
METAL_FUNC void moe_down_any(
    D down, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* inner,
    const device uint* order, uint count, uint lane, threadgroup float* answers) {
#define MOE_CALL(ROWS, TOKENS)      \
  moe_down_tile<ROWS, TOKENS, C, T>( \
      down, bias, is_biased, expert, first_row, inner, order, count, lane, answers)
  MOE_BY_COUNT(MOE_CALL)
#undef MOE_CALL
}
template <typename T, int H, int I, int TOPK, int C, int ACTIVATION, int GATE_MODE, int GATE_BITS, int GATE_GROUP, bool GATE_BIASED, typename GATE_S, int UP_MODE, int UP_BITS, int UP_GROUP, bool UP_BIASED, typename UP_S>
[[kernel]] void custom_kernel_moe_gate_up__bfloat16_t_256_128_3_32_0_0_4_64_0_bfloat16_t_0_4_64_0_bfloat16_t_bfloat16_t_uint32_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_floatc_bfloat16_t(
  const device bfloat16_t* x [[buffer(0)]],
  const constant uint32_t* indices [[buffer(1)]],
  const device uint32_t* gate_weight [[buffer(2)]],
  const device bfloat16_t* gate_scales [[buffer(3)]],
  const device bfloat16_t* gate_biases [[buffer(4)]],
  const device bfloat16_t* gate_bias [[buffer(5)]],
  const device uint32_t* up_weight [[buffer(6)]],
  const device bfloat16_t* up_scales [[buffer(7)]],
  const device bfloat16_t* up_biases [[buffer(8)]],
  const device bfloat16_t* up_bias [[buffer(9)]],
  const constant float* limits [[buffer(10)]],
  device bfloat16_t* inner [[buffer(11)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint simdgroups_per_threadgroup [[simdgroups_per_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
    // One token: inner (TOPK, I) = activation(gate . x, up . x) of the experts it chose. A threadgroup in x makes
    // MOE_ROWS rows a simdgroup, y is the choice.
    typedef MoeMatrix<GATE_MODE, GATE_BITS, GATE_GROUP, I, H, C, GATE_S, T> Gate;
    typedef MoeMatrix<UP_MODE, UP_BITS, UP_GROUP, I, H, C, UP_S, T> Up;
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * MOE_ROWS;
    if (first_row >= uint(I)) {
        return;
    }
    const Gate gate = {(const device uint*)gate_weight, gate_scales, gate_biases};
    const Up up = {(const device uint*)up_weight, up_scales, up_biases};
    const uint choice = threadgroup_position_in_grid.y;
    moe_gate_up_one<C, ACTIVATION, T>(
        gate, up, gate_bias, up_bias, GATE_BIASED, UP_BIASED, indices[choice], first_row, x,
        thread_index_in_simdgroup, limits[0], limits[1], inner + choice * I);

}

template [[host_name("custom_kernel_moe_gate_up__bfloat16_t_256_128_3_32_0_0_4_64_0_bfloat16_t_0_4_64_0_bfloat16_t_bfloat16_t_uint32_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_floatc_bfloat16_t")]] [[kernel]] decltype(custom_kernel_moe_gate_up__bfloat16_t_256_128_3_32_0_0_4_64_0_bfloat16_t_0_4_64_0_bfloat16_t_bfloat16_t_uint32_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_floatc_bfloat16_t<bfloat16_t, 256, 128, 3, 32, 0, 0, 4, 64, 0, bfloat16_t, 0, 4, 64, 0, bfloat16_t>) custom_kernel_moe_gate_up__bfloat16_t_256_128_3_32_0_0_4_64_0_bfloat16_t_0_4_64_0_bfloat16_t_bfloat16_t_uint32_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_floatc_bfloat16_t<bfloat16_t, 256, 128, 3, 32, 0, 0, 4, 64, 0, bfloat16_t, 0, 4, 64, 0, bfloat16_t>;
