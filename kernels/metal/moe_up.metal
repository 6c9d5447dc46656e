    // One token: inner (TOPK, I) = activation(up . x) of the experts it chose. A threadgroup in x makes ROWS rows a
    // simdgroup, y is the choice.
    typedef MoeMatrix<UP_MODE, UP_BITS, UP_GROUP, I, H, C, UP_S, T> Up;
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
    if (first_row >= uint(I)) {
        return;
    }
    const Up up = {(const device uint*)up_weight, up_scales, up_biases};
    const uint choice = threadgroup_position_in_grid.y;
    moe_up_one<ROWS, C, ACTIVATION, T>(
        up, up_bias, UP_BIASED, indices[choice], first_row, x, thread_index_in_simdgroup, inner + choice * I);
