    // y (rows, OUT) = rotate(the sum of parts (SPLITS, rows, WIDTH)) * svh + bias: one simdgroup a block of a row.
    const uint lane = thread_index_in_simdgroup, block = threadgroup_position_in_grid.x;
    const uint row = threadgroup_position_in_grid.y, num_rows = uint(parts_shape[1]);
    const uint expert = MODE == EXL3_SINGLE ? 0 : indices[row];
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (uint split = 0; split < uint(SPLITS); split++) {
        const device float* part = parts + (ulong(split) * num_rows + row) * WIDTH + block * EXL3_BLOCK + 4 * lane;
        for (uint i = 0; i < 4; i++) {
            v[i] += part[i];
        }
    }
    exl3_rotate(v, lane);
    for (uint i = 0; i < 4; i++) {
        const uint out = block * EXL3_BLOCK + 4 * lane + i;
        if (out < uint(OUT)) {
            const float offset = BIASED ? float(bias[expert * OUT + out]) : 0.0f;
            y[ulong(row) * OUT + out] = Y(metal::fma(v[i], float(svh[expert * WIDTH + out]), offset));
        }
    }
