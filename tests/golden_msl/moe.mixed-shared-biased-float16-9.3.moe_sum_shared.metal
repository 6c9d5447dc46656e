template <typename T, int H, int I, int TOPK, bool SHARED_SCORED>
[[kernel]] void custom_kernel_moe_sum_shared__float16_t_256_128_3_0_float_float16_t_float_float16_t_float16_t(
  const device float* answers [[buffer(0)]],
  const device float16_t* scores [[buffer(1)]],
  const constant int* scores_shape [[buffer(2)]],
  const device float* shared_answers [[buffer(3)]],
  const device float16_t* shared_scores [[buffer(4)]],
  device float16_t* out [[buffer(5)]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
  uint3 threads_per_threadgroup [[threads_per_threadgroup]]) {
    // As moe_sum.metal; the shared expert's answer is added last, times its own score where it has one.
    const uint place = threadgroup_position_in_grid.x * threads_per_threadgroup.x + thread_index_in_threadgroup;
    if (place >= uint(scores_shape[0]) * H) {
        return;
    }
    const uint token = place / H, row = place % H;
    float sum = 0.0f;
    for (uint k = token * TOPK; k < (token + 1) * TOPK; k++) {
        sum = metal::fma(float(scores[k]), answers[k * H + row], sum);
    }
    const float weight = SHARED_SCORED ? float(shared_scores[token]) : 1.0f;
    out[place] = T(metal::fma(weight, shared_answers[place], sum));

}

template [[host_name("custom_kernel_moe_sum_shared__float16_t_256_128_3_0_float_float16_t_float_float16_t_float16_t")]] [[kernel]] decltype(custom_kernel_moe_sum_shared__float16_t_256_128_3_0_float_float16_t_float_float16_t_float16_t<float16_t, 256, 128, 3, 0>) custom_kernel_moe_sum_shared__float16_t_256_128_3_0_float_float16_t_float_float16_t_float16_t<float16_t, 256, 128, 3, 0>;
