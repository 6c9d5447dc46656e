    // A few tokens: out (T, H) = sum over a token's choices of score * (down . inner + bias), or without scores each
    // choice's own, (T, TOPK, H). A threadgroup makes MOE_ROWS rows for all tokens: its simdgroups share out the tiles,
    // each pair's answer has its place in threadgroup memory, and the sum goes through them in the choices' order.
    typedef MoeMatrix<DOWN_MODE, DOWN_BITS, DOWN_GROUP, H, I, C, DOWN_S, T> Down;
    enum { NUM_ANSWERS = MAX_TOKENS * TOPK * MOE_ROWS };
    threadgroup float answers[NUM_ANSWERS];
    const uint first_row = threadgroup_position_in_grid.x * MOE_ROWS;
    const Down down = {(const device uint*)down_weight, down_scales, down_biases};
    const uint num_tiles = tiles[0];
    for (uint tile = simdgroup_index_in_threadgroup; tile < num_tiles; tile += simdgroups_per_threadgroup) {
        const uint expert = tiles[4 * tile + 4], first = tiles[4 * tile + 5], count = tiles[4 * tile + 6];
        moe_down_any<TILE, C, T>(
            down, down_bias, DOWN_BIASED, expert, first_row, inner, order + first, count, thread_index_in_simdgroup,
            answers);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint num_tokens = uint(indices_shape[0]);
    const uint num_sums = (WEIGHTED ? num_tokens : num_tokens * TOPK) * MOE_ROWS;
    for (uint i = thread_index_in_threadgroup; i < num_sums; i += threads_per_threadgroup.x) {
        const uint at = i / MOE_ROWS, row = first_row + i % MOE_ROWS;
        float sum = answers[i];
        if (WEIGHTED) {
            sum = 0.0f;
            for (uint k = at * TOPK; k < (at + 1) * TOPK; k++) {
                sum = metal::fma(float(scores[k]), answers[k * MOE_ROWS + i % MOE_ROWS], sum);
            }
        }
        if (row < uint(H)) {
            out[ulong(at) * H + row] = T(sum);
        }
    }
