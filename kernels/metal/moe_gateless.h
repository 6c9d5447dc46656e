// Blocks of experts without a gate: up, an activation of it alone, and down, whose kernels are those of moe.h.

enum { MOE_RELU2 = 7, MOE_GELU = 8 };

template <int ACTIVATION>
METAL_FUNC float moe_activate_alone(float up) {
  if (ACTIVATION == MOE_RELU2) return up <= 0.0f ? 0.0f : up * up;
  const float z = 0.7978845608028654f * metal::fma(0.044715f * up * up, up, up);
  return up / (1.0f + metal::exp(-2.0f * z));  // up * (1 + tanh(z)) / 2
}

// ---- one token: ROWS rows of one expert -----------------------------------------------------------------------
template <int ROWS, int C, int ACTIVATION, typename T, typename U, typename B>
METAL_FUNC void moe_up_one(
    U up, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* x, uint lane,
    device T* inner) {
  const uint at[1] = {0};
  const MoeLane<ROWS, 1> mine(lane);
  float sum = moe_sums<ROWS, 1, C, T>(up, expert, first_row, x, at, lane);
  const uint row = first_row + mine.row;
  if (mine.is_first && row < uint(U::NUM_ROWS)) {
    if (is_biased) sum += float(bias[expert * U::NUM_ROWS + row]);
    inner[row] = T(moe_activate_alone<ACTIVATION>(sum));
  }
}

// ---- a few tokens, as moe.h has it for gate and up --------------------------------------------------------------
template <int ROWS, int TOKENS, int C, int ACTIVATION, typename T, typename U, typename B>
METAL_FUNC void moe_up_tile(
    U up, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* x, uint choices,
    const threadgroup ushort* pairs, uint count, uint lane, device T* inner) {
  enum { PART = MoePart<ROWS, TOKENS>::COUNT };
  uint at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) at[t] = uint(pairs[metal::min(uint(t), count - 1)]) / choices;
  const MoeLane<PART, TOKENS> mine(lane);
  for (uint part = first_row; part < metal::min(first_row + ROWS, uint(U::NUM_ROWS)); part += PART) {
    float sum = moe_sums<PART, TOKENS, C, T>(up, expert, part, x, at, lane);
    const uint row = part + mine.row;
    if (mine.is_first && mine.token < count && row < uint(U::NUM_ROWS)) {
      if (is_biased) sum += float(bias[expert * U::NUM_ROWS + row]);
      inner[ulong(pairs[mine.token]) * U::NUM_ROWS + row] = T(moe_activate_alone<ACTIVATION>(sum));
    }
  }
}
template <int TILE, int ROWS, int C, int ACTIVATION, typename T, typename U, typename B>
METAL_FUNC void moe_up_any(
    U up, const device B* bias, bool is_biased, ulong expert, uint first_row, const device T* x, uint choices,
    const threadgroup ushort* all, uint num_pairs, uint lane, device T* inner) {
#define MOE_CALL(TOKENS)                      \
  moe_up_tile<ROWS, TOKENS, C, ACTIVATION, T>( \
      up, bias, is_biased, expert, first_row, x, choices, pairs, count, lane, inner)
  for (uint first = 0; first < num_pairs; first += TILE) {
    const threadgroup ushort* pairs = all + first;
    const uint count = metal::min(num_pairs - first, uint(TILE));
    MOE_BY_COUNT(MOE_CALL)
  }
#undef MOE_CALL
}
