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
// What the kernels of a block of experts share: dot products of a few rows with a few tokens, their sums over the
// lanes, activations. A simdgroup makes ROWS rows for TOKENS tokens; each weight becomes a float once and meets
// every token. Sums are float32, in an order that depends on C alone: a token's answer has the same bits in any
// company.

// How many numbers of a token a lane loads at a time: 16 bytes of them, where registers are left for it.
template <int TOKENS, int C, typename T>
struct MoeStep {
  enum { COUNT = sizeof(T) == 2 && C >= 8 && TOKENS <= 8 ? 8 : 4, WORDS = COUNT * sizeof(T) / 4 };
};

// sums[token * ROWS + row] += row . x[token], for one chunk
template <int ROWS, int TOKENS, int C, typename T, typename M>
METAL_FUNC void moe_dot_chunk(
    M m, ulong expert, uint first_row, const device T* x, const thread uint* at, uint chunk, thread float* sums) {
  typedef MoeStep<TOKENS, C, T> Step;
  uint w[ROWS * M::CHUNK_WORDS];
  float s[ROWS], b[ROWS];
  m.template load<ROWS>(expert, first_row, chunk, w, s, b);
#pragma unroll
  for (int begin = 0; begin < C; begin += Step::COUNT) {
    uint y[TOKENS * Step::WORDS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      moe_words<Step::WORDS>((const device uint*)(x + (at[t] * (M::CHUNKS * C) + chunk * C + begin)), y + t * Step::WORDS);
    }
#pragma unroll
    for (int part = 0; part < Step::COUNT; part += 4) {
      float v[ROWS * 4];
#pragma unroll
      for (int r = 0; r < ROWS; r++) M::four(w + r * M::CHUNK_WORDS, s[r], b[r], begin + part, v + 4 * r);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float z[4];
        MoeFour<T>::unpack(y + t * Step::WORDS, part, z);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
          for (int i = 0; i < 4; i++) sums[t * ROWS + r] = metal::fma(z[i], v[4 * r + i], sums[t * ROWS + r]);
        }
      }
    }
  }
}

// The same for two matrices, so that x is read once.
template <int ROWS, int TOKENS, int C, typename T, typename G, typename U>
METAL_FUNC void moe_dot_two_chunk(
    G gate, U up, ulong expert, uint first_row, const device T* x, const thread uint* at, uint chunk,
    thread float* gates, thread float* ups) {
  typedef MoeStep<TOKENS, C, T> Step;
  uint wg[ROWS * G::CHUNK_WORDS], wu[ROWS * U::CHUNK_WORDS];
  float sg[ROWS], bg[ROWS], su[ROWS], bu[ROWS];
  gate.template load<ROWS>(expert, first_row, chunk, wg, sg, bg);
  up.template load<ROWS>(expert, first_row, chunk, wu, su, bu);
#pragma unroll
  for (int begin = 0; begin < C; begin += Step::COUNT) {
    uint y[TOKENS * Step::WORDS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      moe_words<Step::WORDS>((const device uint*)(x + (at[t] * (G::CHUNKS * C) + chunk * C + begin)), y + t * Step::WORDS);
    }
#pragma unroll
    for (int part = 0; part < Step::COUNT; part += 4) {
      float vg[ROWS * 4], vu[ROWS * 4];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        G::four(wg + r * G::CHUNK_WORDS, sg[r], bg[r], begin + part, vg + 4 * r);
        U::four(wu + r * U::CHUNK_WORDS, su[r], bu[r], begin + part, vu + 4 * r);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float z[4];
        MoeFour<T>::unpack(y + t * Step::WORDS, part, z);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            gates[t * ROWS + r] = metal::fma(z[i], vg[4 * r + i], gates[t * ROWS + r]);
            ups[t * ROWS + r] = metal::fma(z[i], vu[4 * r + i], ups[t * ROWS + r]);
          }
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
#pragma unroll 1
  for (int round = 0; round < M::CHUNKS / MOE_SIMD; round++) {
    moe_dot_chunk<ROWS, TOKENS, C, T>(m, expert, first_row, x, at, lane + round * MOE_SIMD, sums);
  }
  if (lane < uint(M::CHUNKS % MOE_SIMD)) {
    moe_dot_chunk<ROWS, TOKENS, C, T>(m, expert, first_row, x, at, lane + M::CHUNKS / MOE_SIMD * MOE_SIMD, sums);
  }
  MoeFold<ROWS * TOKENS, 16>::run(sums, lane);
  return sums[0];
}
// Gate and up together while their sums fit into the registers, else one after the other.
template <int ROWS, int TOKENS, int C, typename T, typename G, typename U>
METAL_FUNC void moe_gate_up_sums(
    G gate, U up, ulong expert, uint first_row, const device T* x, const thread uint* at, uint lane,
    thread float& gate_sum, thread float& up_sum) {
  if (ROWS * TOKENS > MOE_SUMS) {
    gate_sum = moe_sums<ROWS, TOKENS, C, T>(gate, expert, first_row, x, at, lane);
    up_sum = moe_sums<ROWS, TOKENS, C, T>(up, expert, first_row, x, at, lane);
    return;
  }
  float gates[ROWS * TOKENS], ups[ROWS * TOKENS];
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) gates[i] = ups[i] = 0.0f;
#pragma unroll 1
  for (int round = 0; round < G::CHUNKS / MOE_SIMD; round++) {
    moe_dot_two_chunk<ROWS, TOKENS, C, T>(gate, up, expert, first_row, x, at, lane + round * MOE_SIMD, gates, ups);
  }
  if (lane < uint(G::CHUNKS % MOE_SIMD)) {
    const uint chunk = lane + G::CHUNKS / MOE_SIMD * MOE_SIMD;
    moe_dot_two_chunk<ROWS, TOKENS, C, T>(gate, up, expert, first_row, x, at, chunk, gates, ups);
  }
  MoeFold<ROWS * TOKENS, 16>::run(gates, lane);
  MoeFold<ROWS * TOKENS, 16>::run(ups, lane);
  gate_sum = gates[0];
  up_sum = ups[0];
}

// ---- one token: ROWS rows of one expert -----------------------------------------------------------------------
template <int ROWS, int C, int ACTIVATION, typename T, typename G, typename U, typename GB, typename UB>
METAL_FUNC void moe_gate_up_one(
    G gate, U up, const device GB* gate_bias, const device UB* up_bias, bool gate_biased, bool up_biased,
    ulong expert, uint first_row, const device T* x, uint lane, float alpha, float limit, device T* inner) {
  const uint at[1] = {0};
  const MoeLane<ROWS, 1> mine(lane);
  float g, u;
  moe_gate_up_sums<ROWS, 1, C, T>(gate, up, expert, first_row, x, at, lane, g, u);
  const uint row = first_row + mine.row;
  if (mine.is_first && row < uint(G::NUM_ROWS)) {
    if (gate_biased) g += float(gate_bias[expert * G::NUM_ROWS + row]);
    if (up_biased) u += float(up_bias[expert * G::NUM_ROWS + row]);
    inner[row] = T(moe_activate<ACTIVATION>(g, u, alpha, limit));
  }
}
template <int ROWS, int C, typename T, typename D, typename B>
METAL_FUNC void moe_down_one(
    D down, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* inner, uint lane,
    threadgroup float* answers) {
  const uint at[1] = {0};
  const MoeLane<ROWS, 1> mine(lane);
  float sum = moe_sums<ROWS, 1, C, T>(down, expert, first_row, inner, at, lane);
  const uint row = first_row + mine.row;
  if (mine.is_first && row < uint(D::NUM_ROWS)) {
    if (is_biased) sum += float(bias[expert * D::NUM_ROWS + row]);
    answers[mine.row] = sum;
  }
}

// ---- a few tokens ---------------------------------------------------------------------------------------------
// A pair is a token's choice of an expert. A threadgroup makes some rows of one expert for all its pairs: slot y of
// the grid is an expert, or where there are fewer pairs than experts a pair, and then the first pair of an expert
// works for all of them.
// The pairs of one expert in the order of the tokens; returns how many. One simdgroup. Indices: a pointer, of fewer
// than 8 numbers to constant memory.
template <typename Indices>
METAL_FUNC uint moe_pairs(Indices indices, uint num_pairs, uint expert, uint lane, threadgroup ushort* pairs) {
  uint count = 0;
  for (uint base = 0; base < num_pairs; base += MOE_SIMD) {
    const uint pair = base + lane;
    const uint mine = pair < num_pairs && indices[pair] == expert ? 1 : 0;
    const uint upto = simd_prefix_inclusive_sum(mine);
    if (mine) pairs[count + upto - 1] = ushort(pair);
    count += simd_broadcast(upto, ushort(MOE_SIMD - 1));
  }
  return count;
}

// A tile of the pairs takes TOKENS places, as many as it needs in powers of two (behind its last pair they hold that
// pair again, which is not written), and as many of the simdgroup's ROWS at a time as the registers hold: a kernel
// takes as many for all its threads as its greediest path. Weights are read once in any case.
template <int ROWS, int TOKENS>
struct MoePart {
  enum { FIT = MOE_SUMS / TOKENS > 1 ? MOE_SUMS / TOKENS : 1, COUNT = int(ROWS) < int(FIT) ? int(ROWS) : int(FIT) };
};
template <int ROWS, int TOKENS, int C, int ACTIVATION, typename T, typename G, typename U, typename GB, typename UB>
METAL_FUNC void moe_gate_up_tile(
    G gate, U up, const device GB* gate_bias, const device UB* up_bias, bool gate_biased, bool up_biased,
    ulong expert, uint first_row, const device T* x, uint choices, const threadgroup ushort* pairs, uint count,
    uint lane, float alpha, float limit, device T* inner) {
  enum { PART = MoePart<ROWS, TOKENS>::COUNT };
  uint at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) at[t] = uint(pairs[metal::min(uint(t), count - 1)]) / choices;
  const MoeLane<PART, TOKENS> mine(lane);
  for (uint part = first_row; part < metal::min(first_row + ROWS, uint(G::NUM_ROWS)); part += PART) {
    float g, u;
    moe_gate_up_sums<PART, TOKENS, C, T>(gate, up, expert, part, x, at, lane, g, u);
    const uint row = part + mine.row;
    if (mine.is_first && mine.token < count && row < uint(G::NUM_ROWS)) {
      if (gate_biased) g += float(gate_bias[expert * G::NUM_ROWS + row]);
      if (up_biased) u += float(up_bias[expert * G::NUM_ROWS + row]);
      inner[ulong(pairs[mine.token]) * G::NUM_ROWS + row] = T(moe_activate<ACTIVATION>(g, u, alpha, limit));
    }
  }
}
// The answers without their scores, as A: answers[pair * NUM_ROWS + row].
template <int ROWS, int TOKENS, int C, typename T, typename D, typename B, typename A>
METAL_FUNC void moe_down_tile(
    D down, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* inner,
    const threadgroup ushort* pairs, uint count, uint lane, device A* answers) {
  enum { PART = MoePart<ROWS, TOKENS>::COUNT };
  uint at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) at[t] = pairs[metal::min(uint(t), count - 1)];
  const MoeLane<PART, TOKENS> mine(lane);
  for (uint part = first_row; part < metal::min(first_row + ROWS, uint(D::NUM_ROWS)); part += PART) {
    float sum = moe_sums<PART, TOKENS, C, T>(down, expert, part, inner, at, lane);
    const uint row = part + mine.row;
    if (mine.is_first && mine.token < count && row < uint(D::NUM_ROWS)) {
      if (is_biased) sum += float(bias[expert * D::NUM_ROWS + row]);
      answers[ulong(pairs[mine.token]) * D::NUM_ROWS + row] = A(sum);
    }
  }
}

#define MOE_BY_COUNT(CALL)                 \
  if (count == 1) {                        \
    CALL(1);                               \
  } else if (count == 2) {                 \
    CALL(2);                               \
  } else if (count <= 4) {                 \
    CALL(4);                               \
  } else if (count <= 8) {                 \
    CALL(8);                               \
  } else if (count <= 16 || TILE <= 16) {  \
    CALL(16);                              \
  } else {                                 \
    CALL((TILE > 16 ? 32 : 16));           \
  }
// All pairs of an expert, TILE of them at a time.
template <int TILE, int ROWS, int C, int ACTIVATION, typename T, typename G, typename U, typename GB, typename UB>
METAL_FUNC void moe_gate_up_any(
    G gate, U up, const device GB* gate_bias, const device UB* up_bias, bool gate_biased, bool up_biased,
    ulong expert, uint first_row, const device T* x, uint choices, const threadgroup ushort* all, uint num_pairs,
    uint lane, float alpha, float limit, device T* inner) {
#define MOE_CALL(TOKENS)                                                                                              \
  moe_gate_up_tile<ROWS, TOKENS, C, ACTIVATION, T>(                                                                   \
      gate, up, gate_bias, up_bias, gate_biased, up_biased, expert, first_row, x, choices, pairs, count, lane, alpha, \
      limit, inner)
  for (uint first = 0; first < num_pairs; first += TILE) {
    const threadgroup ushort* pairs = all + first;
    const uint count = metal::min(num_pairs - first, uint(TILE));
    MOE_BY_COUNT(MOE_CALL)
  }
#undef MOE_CALL
}
template <int TILE, int ROWS, int C, typename T, typename D, typename B, typename A>
METAL_FUNC void moe_down_any(
    D down, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* inner,
    const threadgroup ushort* all, uint num_pairs, uint lane, device A* answers) {
#define MOE_CALL(TOKENS)                    \
  moe_down_tile<ROWS, TOKENS, C, T>(        \
      down, bias, is_biased, expert, first_row, inner, pairs, count, lane, answers)
  for (uint first = 0; first < num_pairs; first += TILE) {
    const threadgroup ushort* pairs = all + first;
    const uint count = metal::min(num_pairs - first, uint(TILE));
    MOE_BY_COUNT(MOE_CALL)
  }
#undef MOE_CALL
}
template <typename T, int H, int I, int TOPK, int E, int TILE, int MAX_TOKENS, int C, int DOWN_MODE, int DOWN_BITS, int DOWN_GROUP, bool DOWN_BIASED, typename DOWN_S, int ROWS>
[[kernel]] void custom_kernel_moe_down_batch__bfloat16_t_256_128_3_5_32_63_8_0_4_64_0_bfloat16_t_16_bfloat16_t_uint32_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_float(
  const device bfloat16_t* inner [[buffer(0)]],
  const device uint32_t* indices [[buffer(1)]],
  const constant int* indices_shape [[buffer(2)]],
  const device uint32_t* down_weight [[buffer(3)]],
  const device bfloat16_t* down_scales [[buffer(4)]],
  const device bfloat16_t* down_biases [[buffer(5)]],
  const device bfloat16_t* down_bias [[buffer(6)]],
  device float* answers [[buffer(7)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint simdgroups_per_threadgroup [[simdgroups_per_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
    // A few tokens: answers (T * TOPK, H) = down . inner + bias of every pair. A threadgroup in x makes ROWS rows a
    // simdgroup, y is the slot of an expert, as moe.h says.
    typedef MoeMatrix<DOWN_MODE, DOWN_BITS, DOWN_GROUP, H, I, C, DOWN_S, T> Down;
    enum { MAX_PAIRS = MAX_TOKENS * TOPK };
    threadgroup ushort pairs[MAX_PAIRS];
    threadgroup uint counted[1];
    const uint lane = thread_index_in_simdgroup, num_tokens = uint(indices_shape[0]), num_pairs = num_tokens * TOPK;
    const uint slot = threadgroup_position_in_grid.y;
    const bool is_by_pair = num_pairs < uint(E);
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
    const uint expert = is_by_pair ? indices[slot] : slot;
    if (simdgroup_index_in_threadgroup == 0) {
        const uint count = moe_pairs(indices, num_pairs, expert, lane, pairs);
        if (lane == 0) {
            counted[0] = count;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint count = counted[0];
    if (first_row >= uint(H) || count == 0 || (is_by_pair && pairs[0] != slot)) {
        return;
    }
    const Down down = {(const device uint*)down_weight, down_scales, down_biases};
    moe_down_any<TILE, ROWS, C, T>(
        down, down_bias, DOWN_BIASED, expert, first_row, inner, pairs, count, lane, answers);

}

template [[host_name("custom_kernel_moe_down_batch__bfloat16_t_256_128_3_5_32_63_8_0_4_64_0_bfloat16_t_16_bfloat16_t_uint32_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_float")]] [[kernel]] decltype(custom_kernel_moe_down_batch__bfloat16_t_256_128_3_5_32_63_8_0_4_64_0_bfloat16_t_16_bfloat16_t_uint32_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_float<bfloat16_t, 256, 128, 3, 5, 32, 63, 8, 0, 4, 64, 0, bfloat16_t, 16>) custom_kernel_moe_down_batch__bfloat16_t_256_128_3_5_32_63_8_0_4_64_0_bfloat16_t_16_bfloat16_t_uint32_t_uint32_t_bfloat16_t_bfloat16_t_bfloat16_t_float<bfloat16_t, 256, 128, 3, 5, 32, 63, 8, 0, 4, 64, 0, bfloat16_t, 16>;
