    // One token: out (H) = sum of score * (down . inner + bias) over its choices, or without scores each choice's
    // own, (TOPK, H). A threadgroup makes ROWS rows, its simdgroups share out the choices.
    typedef MoeMatrix<DOWN_MODE, DOWN_BITS, DOWN_GROUP, H, I, C, DOWN_S, T> Down;
    enum { NUM_ANSWERS = TOPK * ROWS };
    threadgroup float answers[NUM_ANSWERS];
    const uint first_row = threadgroup_position_in_grid.x * ROWS;
    const Down down = {(const device uint*)down_weight, down_scales, down_biases};
    for (uint choice = simdgroup_index_in_threadgroup; choice < uint(TOPK); choice += simdgroups_per_threadgroup) {
        moe_down_one<ROWS, C, T>(
            down, down_bias, DOWN_BIASED, indices[choice], first_row, inner + choice * I, thread_index_in_simdgroup,
            answers + choice * ROWS);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint num_sums = WEIGHTED ? ROWS : TOPK * ROWS;
    for (uint i = thread_index_in_threadgroup; i < num_sums; i += threads_per_threadgroup.x) {
        float sum = answers[i];
        if (WEIGHTED) {
            sum = 0.0f;
            for (int k = 0; k < TOPK; k++) {
                sum = metal::fma(float(scores[k]), answers[k * ROWS + i], sum);
            }
        }
        const uint row = first_row + i % ROWS;
        if (row < uint(H)) {
            out[ulong(i / ROWS) * H + row] = T(sum);
        }
    }
