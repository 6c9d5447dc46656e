    // As moe_down_sum.metal with scores; the shared expert's answer is added last, times its own score where it has one.
    typedef MoeMatrix<DOWN_MODE, DOWN_BITS, DOWN_GROUP, H, I, C, DOWN_S, T> Down;
    typedef MoeMatrix<SHARED_DOWN_MODE, SHARED_DOWN_BITS, SHARED_DOWN_GROUP, H, SHARED_I, SHARED_C, SHARED_DOWN_S, T> SharedDown;
    enum { NUM_ANSWERS = TOPK * ROWS + ROWS };
    threadgroup float answers[NUM_ANSWERS];
    const uint first_row = threadgroup_position_in_grid.x * ROWS, lane = thread_index_in_simdgroup;
    const Down down = {(const device uint*)down_weight, down_scales, down_biases};
    const SharedDown shared_down = {(const device uint*)shared_down_weight, shared_down_scales, shared_down_biases};
    for (uint choice = simdgroup_index_in_threadgroup; choice <= uint(TOPK); choice += simdgroups_per_threadgroup) {
        if (choice < uint(TOPK)) {
            moe_down_one<ROWS, C, T>(
                down, down_bias, DOWN_BIASED, indices[choice], first_row, inner + choice * I, lane,
                answers + choice * ROWS);
        } else {
            moe_down_one<ROWS, SHARED_C, T>(
                shared_down, shared_down_bias, SHARED_DOWN_BIASED, 0, first_row, shared_inner, lane,
                answers + choice * ROWS);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint row = first_row + thread_index_in_threadgroup;
    if (thread_index_in_threadgroup < ROWS && row < uint(H)) {
        float sum = 0.0f;
        for (int k = 0; k < TOPK; k++) {
            sum = metal::fma(float(scores[k]), answers[k * ROWS + thread_index_in_threadgroup], sum);
        }
        const float weight = SHARED_SCORED ? float(shared_scores[0]) : 1.0f;
        out[row] = T(metal::fma(weight, answers[TOPK * ROWS + thread_index_in_threadgroup], sum));
    }
