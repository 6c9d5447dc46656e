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
