    // As moe_gate_up_batch.metal, with the shared expert's own inner (T, SHARED_I): the slots behind the last one are
    // runs of TILE tokens for it.
    typedef MoeMatrix<GATE_MODE, GATE_BITS, GATE_GROUP, I, H, C, GATE_S, T> Gate;
    typedef MoeMatrix<UP_MODE, UP_BITS, UP_GROUP, I, H, C, UP_S, T> Up;
    typedef MoeMatrix<SHARED_GATE_MODE, SHARED_GATE_BITS, SHARED_GATE_GROUP, SHARED_I, H, SHARED_C, SHARED_GATE_S, T> SharedGate;
    typedef MoeMatrix<SHARED_UP_MODE, SHARED_UP_BITS, SHARED_UP_GROUP, SHARED_I, H, SHARED_C, SHARED_UP_S, T> SharedUp;
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
        if (first_row >= uint(SHARED_I)) {
            return;
        }
        const SharedGate gate = {(const device uint*)shared_gate_weight, shared_gate_scales, shared_gate_biases};
        const SharedUp up = {(const device uint*)shared_up_weight, shared_up_scales, shared_up_biases};
        moe_gate_up_any<TILE, ROWS, SHARED_C, SHARED_ACTIVATION, T>(
            gate, up, shared_gate_bias, shared_up_bias, SHARED_GATE_BIASED, SHARED_UP_BIASED, 0, first_row, x, 1, pairs,
            count, lane, shared_limits[0], shared_limits[1], shared_inner);
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
    if (first_row >= uint(I) || count == 0 || (is_by_pair && pairs[0] != slot)) {
        return;
    }
    const Gate gate = {(const device uint*)gate_weight, gate_scales, gate_biases};
    const Up up = {(const device uint*)up_weight, up_scales, up_biases};
    moe_gate_up_any<TILE, ROWS, C, ACTIVATION, T>(
        gate, up, gate_bias, up_bias, GATE_BIASED, UP_BIASED, expert, first_row, x, TOPK, pairs, count, lane, limits[0],
        limits[1], inner);
