template <typename T, int H, int I, int TOPK>
[[kernel]] void custom_kernel_moe_sum__bfloat16_t_256_128_3_float_bfloat16_t_bfloat16_t(
  const device float* answers [[buffer(0)]],
  const device bfloat16_t* scores [[buffer(1)]],
  const constant int* scores_shape [[buffer(2)]],
  device bfloat16_t* out [[buffer(3)]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
  uint3 threads_per_threadgroup [[threads_per_threadgroup]]) {
    // A few tokens: out (T, H) = sum over a token's choices of score * answer, in the choices' order.
    const uint place = threadgroup_position_in_grid.x * threads_per_threadgroup.x + thread_index_in_threadgroup;
    if (place >= uint(scores_shape[0]) * H) {
        return;
    }
    const uint token = place / H, row = place % H;
    float sum = 0.0f;
    for (uint k = token * TOPK; k < (token + 1) * TOPK; k++) {
        sum = metal::fma(float(scores[k]), answers[k * H + row], sum);
    }
    out[place] = T(sum);

}

template [[host_name("custom_kernel_moe_sum__bfloat16_t_256_128_3_float_bfloat16_t_bfloat16_t")]] [[kernel]] decltype(custom_kernel_moe_sum__bfloat16_t_256_128_3_float_bfloat16_t_bfloat16_t<bfloat16_t, 256, 128, 3>) custom_kernel_moe_sum__bfloat16_t_256_128_3_float_bfloat16_t_bfloat16_t<bfloat16_t, 256, 128, 3>;
