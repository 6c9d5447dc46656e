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
