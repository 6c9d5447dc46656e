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
