    // As moe_down_batch.metal with scores; the shared expert's answers lie behind those of the pairs, and are added
    // last. Its tiles are runs of TILE tokens.
    typedef MoeMatrix<DOWN_MODE, DOWN_BITS, DOWN_GROUP, H, I, C, DOWN_S, T> Down;
    typedef MoeMatrix<SHARED_DOWN_MODE, SHARED_DOWN_BITS, SHARED_DOWN_GROUP, H, SHARED_I, SHARED_C, SHARED_DOWN_S, T> SharedDown;
    enum { NUM_PAIRS = MAX_TOKENS * TOPK, NUM_ANSWERS = NUM_PAIRS * MOE_ROWS + MAX_TOKENS * MOE_ROWS };
    threadgroup float answers[NUM_ANSWERS];
    const uint first_row = threadgroup_position_in_grid.x * MOE_ROWS, lane = thread_index_in_simdgroup;
    const Down down = {(const device uint*)down_weight, down_scales, down_biases};
    const SharedDown shared_down = {(const device uint*)shared_down_weight, shared_down_scales, shared_down_biases};
    const uint num_tokens = uint(indices_shape[0]), num_tiles = tiles[0];
    const uint num_shared = (num_tokens + TILE - 1) / TILE;
    for (uint i = simdgroup_index_in_threadgroup; i < num_tiles + num_shared; i += simdgroups_per_threadgroup) {
        if (i < num_shared) {
            const uint first = i * TILE, count = metal::min(num_tokens - first, uint(TILE));
            moe_down_any<TILE, SHARED_C, T>(
                shared_down, shared_down_bias, SHARED_DOWN_BIASED, 0, first_row, shared_inner, shared_order + first, count,
                lane, answers + NUM_PAIRS * MOE_ROWS);
        } else {
            const uint tile = i - num_shared;
            const uint expert = tiles[4 * tile + 4], first = tiles[4 * tile + 5], count = tiles[4 * tile + 6];
            moe_down_any<TILE, C, T>(
                down, down_bias, DOWN_BIASED, expert, first_row, inner, order + first, count, lane, answers);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index_in_threadgroup; i < num_tokens * MOE_ROWS; i += threads_per_threadgroup.x) {
        const uint token = i / MOE_ROWS, row = first_row + i % MOE_ROWS;
        float sum = 0.0f;
        for (uint k = token * TOPK; k < (token + 1) * TOPK; k++) {
            sum = metal::fma(float(scores[k]), answers[k * MOE_ROWS + i % MOE_ROWS], sum);
        }
        const float weight = SHARED_SCORED ? float(shared_scores[token]) : 1.0f;
        sum = metal::fma(weight, answers[NUM_PAIRS * MOE_ROWS + i], sum);
        if (row < uint(H)) {
            out[ulong(token) * H + row] = T(sum);
        }
    }
