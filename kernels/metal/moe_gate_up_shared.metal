    // As moe_gate_up.metal, with the shared expert's own inner (1, SHARED_I) behind the last choice.
    typedef MoeMatrix<GATE_MODE, GATE_BITS, GATE_GROUP, I, H, C, GATE_S, T> Gate;
    typedef MoeMatrix<UP_MODE, UP_BITS, UP_GROUP, I, H, C, UP_S, T> Up;
    typedef MoeMatrix<SHARED_GATE_MODE, SHARED_GATE_BITS, SHARED_GATE_GROUP, SHARED_I, H, SHARED_C, SHARED_GATE_S, T> SharedGate;
    typedef MoeMatrix<SHARED_UP_MODE, SHARED_UP_BITS, SHARED_UP_GROUP, SHARED_I, H, SHARED_C, SHARED_UP_S, T> SharedUp;
    const uint first_row =
        (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
    const uint choice = threadgroup_position_in_grid.y;
    if (first_row >= uint(choice < uint(TOPK) ? I : SHARED_I)) {
        return;
    }
    if (choice < uint(TOPK)) {
        const Gate gate = {(const device uint*)gate_weight, gate_scales, gate_biases};
        const Up up = {(const device uint*)up_weight, up_scales, up_biases};
        moe_gate_up_one<ROWS, C, ACTIVATION, T>(
            gate, up, gate_bias, up_bias, GATE_BIASED, UP_BIASED, indices[choice], first_row, x,
            thread_index_in_simdgroup, limits[0], limits[1], inner + choice * I);
    } else {
        const SharedGate gate = {(const device uint*)shared_gate_weight, shared_gate_scales, shared_gate_biases};
        const SharedUp up = {(const device uint*)shared_up_weight, shared_up_scales, shared_up_biases};
        moe_gate_up_one<ROWS, SHARED_C, SHARED_ACTIVATION, T>(
            gate, up, shared_gate_bias, shared_up_bias, SHARED_GATE_BIASED, SHARED_UP_BIASED, 0, first_row, x,
            thread_index_in_simdgroup, shared_limits[0], shared_limits[1], shared_inner);
    }
