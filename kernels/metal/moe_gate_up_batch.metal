    // A few tokens: inner (T * TOPK, I) = activation(gate . x, up . x) of every pair. A threadgroup in x makes MOE_ROWS
    // rows a simdgroup, y is the tile; there may be fewer tiles than the grid has room for.
    typedef MoeMatrix<GATE_MODE, GATE_BITS, GATE_GROUP, I, H, C, GATE_S, T> Gate;
    typedef MoeMatrix<UP_MODE, UP_BITS, UP_GROUP, I, H, C, UP_S, T> Up;
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * MOE_ROWS;
    const uint tile = threadgroup_position_in_grid.y;
    if (first_row >= uint(I) || tile >= tiles[0]) {
        return;
    }
    const Gate gate = {(const device uint*)gate_weight, gate_scales, gate_biases};
    const Up up = {(const device uint*)up_weight, up_scales, up_biases};
    const uint expert = tiles[4 * tile + 4], first = tiles[4 * tile + 5], count = tiles[4 * tile + 6];
    moe_gate_up_any<TILE, C, ACTIVATION, T>(
        gate, up, gate_bias, up_bias, GATE_BIASED, UP_BIASED, expert, first_row, x, TOPK, order + first, count,
        thread_index_in_simdgroup, limits[0], limits[1], inner);
