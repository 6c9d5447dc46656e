    // A few tokens: inner (T * TOPK, I) = activation(up . x) of every pair. A threadgroup in x makes ROWS rows a
    // simdgroup, y is the slot of an expert, as moe.h says.
    typedef MoeMatrix<UP_MODE, UP_BITS, UP_GROUP, I, H, C, UP_S, T> Up;
    enum { MAX_PAIRS = MAX_TOKENS * TOPK };
    threadgroup ushort pairs[MAX_PAIRS];
    threadgroup uint counted[1];
    const uint lane = thread_index_in_simdgroup, num_tokens = uint(indices_shape[0]), num_pairs = num_tokens * TOPK;
    const uint slot = threadgroup_position_in_grid.y;
    const bool is_by_pair = num_pairs < uint(E);
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
    const uint expert = is_by_pair ? indices[slot] : slot;
    if (simdgroup_index_in_threadgroup == 0) {
        const uint count = moe_pairs(indices, num_pairs, expert, lane, pairs);
        if (lane == 0) {
            counted[0] = count;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint count = counted[0];
    if (first_row >= uint(I) || count == 0 || (is_by_pair && pairs[0] != slot)) {
        return;
    }
    const Up up = {(const device uint*)up_weight, up_scales, up_biases};
    moe_up_any<TILE, ROWS, C, ACTIVATION, T>(
        up, up_bias, UP_BIASED, expert, first_row, x, TOPK, pairs, count, lane, inner);
