// SiTU, which kimi_k3 joins gate and up with: alpha * tanh(gate / alpha) * sigmoid(gate) * up, and the same with
// limit * tanh(up / limit) in the place of up.

enum { MOE_SITU = 5, MOE_SITU_BOTH = 6 };

METAL_FUNC float moe_bent(float x, float most) { return most * metal::precise::tanh(x / most); }

template <>
METAL_FUNC float moe_activate<MOE_SITU>(float gate, float up, float alpha, float limit) {
  return moe_bent(gate, alpha) / (1.0f + metal::exp(-gate)) * up;
}
template <>
METAL_FUNC float moe_activate<MOE_SITU_BOTH>(float gate, float up, float alpha, float limit) {
  return moe_bent(gate, alpha) / (1.0f + metal::exp(-gate)) * moe_bent(up, limit);
}
