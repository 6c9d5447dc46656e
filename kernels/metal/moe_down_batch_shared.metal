    // As moe_down_batch.metal, with the shared expert's own shared_answers (T, H): the slots behind the last one are
    // runs of TILE tokens for it.
    typedef MoeMatrix<DOWN_MODE, DOWN_BITS, DOWN_GROUP, H, I, C, DOWN_S, T> Down;
    typedef MoeMatrix<SHARED_DOWN_MODE, SHARED_DOWN_BITS, SHARED_DOWN_GROUP, H, SHARED_I, SHARED_C, SHARED_DOWN_S, T> SharedDown;
    enum { MAX_PAIRS = MAX_TOKENS * TOPK };
    threadgroup ushort pairs[MAX_PAIRS];
    threadgroup uint counted[1];
    const uint lane = thread_index_in_simdgroup, num_tokens = uint(indices_shape[0]), num_pairs = num_tokens * TOPK;
    const uint slot = threadgroup_position_in_grid.y;
    const bool is_by_pair = num_pairs < uint(E);
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
    const uint num_slots = is_by_pair ? num_pairs : uint(E);
    if (slot >= num_slots) {
        const uint first = (slot - num_slots) * TILE, count = metal::min(num_tokens - first, uint(TILE));
        for (uint t = thread_index_in_threadgroup; t < count; t += threads_per_threadgroup.x) {
            pairs[t] = ushort(first + t);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (first_row >= uint(H)) {
            return;
        }
        const SharedDown down = {(const device uint*)shared_down_weight, shared_down_scales, shared_down_biases};
        moe_down_any<TILE, ROWS, SHARED_C, T>(
            down, shared_down_bias, SHARED_DOWN_BIASED, 0, first_row, shared_inner, pairs, count, lane, shared_answers);
        return;
    }
    const uint expert = is_by_pair ? indices[slot] : slot;
    if (simdgroup_index_in_threadgroup == 0) {
        const uint count = moe_pairs(indices, num_pairs, expert, lane, pairs);
        if (lane == 0) {
            counted[0] = count;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint count = counted[0];
    if (first_row >= uint(H) || count == 0 || (is_by_pair && pairs[0] != slot)) {
        return;
    }
    const Down down = {(const device uint*)down_weight, down_scales, down_biases};
    moe_down_any<TILE, ROWS, C, T>(
        down, down_bias, DOWN_BIASED, expert, first_row, inner, pairs, count, lane, answers);
