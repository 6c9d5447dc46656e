    // y (rows, OUT) = rotate(rotate(x * suh) Q) * svh + bias of rows x (.., IN), with weights decoded where they are
    // needed. A threadgroup makes a block of 128 outputs of up to ROWS rows, each of its simdgroups a column of tiles,
    // from one of SPLITS parts of the inputs; with more than one part, `y` is (SPLITS, rows, WIDTH) in float32 and
    // exl3_finish does the rest.
    // SINGLE: one matrix; a threadgroup has ROWS rows in order. PAIRS: row z with expert indices[z]. TILES: rows sorted by
    // expert, `indices` their order and `tiles` as exl3_plan makes them. With experts x has a row for SHARE rows of y.
    enum { NUM_ENTRIES = ROWS * EXL3_CHUNK, NUM_SUMS = ROWS * EXL3_BLOCK };
    threadgroup float entry[NUM_ENTRIES];
    threadgroup float sums[NUM_SUMS];
    const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    const uint block = threadgroup_position_in_grid.x, split = threadgroup_position_in_grid.y;
    const uint z = threadgroup_position_in_grid.z;
    const uint num_rows = uint(x_shape[0]) * (MODE == EXL3_SINGLE ? 1 : SHARE);
    uint expert = 0, first = z * ROWS, count = metal::min(uint(ROWS), num_rows - z * ROWS);
    if (MODE == EXL3_PAIRS) {
        expert = indices[z];
        first = z;
        count = 1;
    }
    if (MODE == EXL3_TILES) {
        if (z >= tiles[0]) {
            return;
        }
        expert = tiles[4 + 4 * z];
        first = tiles[5 + 4 * z];
        count = tiles[6 + 4 * z];
    }
    const uint num_blocks = HEIGHT / EXL3_BLOCK, across = WIDTH / EXL3_TILE;
    const uint begin = num_blocks * split / SPLITS, end = num_blocks * (split + 1) / SPLITS;
    Exl3Lane<BITS, BOOK> own;
    own.start(lane);
    const uint tile_words = 8 * BITS;
    const device uint* column = (const device uint*)trellis +
        (ulong(expert) * (HEIGHT / EXL3_TILE) * across + block * EXL3_BLOCK_TILES + group) * tile_words;
    const uint input = 2 * (lane % 4), output = group * EXL3_TILE + lane / 4;
    for (uint base = 0; base < count; base += ROWS) {
        float total[2 * ROWS];
        for (int i = 0; i < 2 * ROWS; i++) {
            total[i] = 0.0f;
        }
        for (uint at = begin; at < end; at += EXL3_CHUNK_BLOCKS) {
            const uint chunk = metal::min(uint(EXL3_CHUNK_BLOCKS), end - at);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint unit = group; unit < ROWS * chunk; unit += EXL3_SIMDGROUPS) {
                const uint row = unit / chunk, channel = (unit % chunk) * EXL3_BLOCK + 4 * lane;
                float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (base + row < count) {
                    const uint pair = MODE == EXL3_TILES ? indices[first + base + row] : first + base + row;
                    const ulong source = ulong(MODE == EXL3_SINGLE ? pair : pair / SHARE) * IN;
                    for (uint i = 0; i < 4; i++) {
                        const uint in = at * EXL3_BLOCK + channel + i;
                        if (in < uint(IN)) {
                            v[i] = float(x[source + in]) * float(suh[expert * HEIGHT + in]);
                        }
                    }
                }
                exl3_rotate(v, lane);
                for (uint i = 0; i < 4; i++) {
                    entry[row * EXL3_CHUNK + channel + i] = v[i];
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const device uint* tile = column + ulong(at) * EXL3_BLOCK_TILES * across * tile_words;
            for (uint step = 0; step < chunk * EXL3_BLOCK_TILES; step++, tile += across * tile_words) {
                half values[8];
                own.decode(tile, values);
                for (int row = 0; row < ROWS; row++) {
                    const threadgroup float* e = entry + row * EXL3_CHUNK + step * EXL3_TILE + input;
                    const float e0 = e[0], e1 = e[1], e8 = e[8], e9 = e[9];
                    float left = metal::fma(float(values[0]), e0, total[2 * row]);
                    float right = metal::fma(float(values[4]), e0, total[2 * row + 1]);
                    left = metal::fma(float(values[1]), e1, left);
                    right = metal::fma(float(values[5]), e1, right);
                    left = metal::fma(float(values[2]), e8, left);
                    right = metal::fma(float(values[6]), e8, right);
                    total[2 * row] = metal::fma(float(values[3]), e9, left);
                    total[2 * row + 1] = metal::fma(float(values[7]), e9, right);
                }
            }
        }
        for (int i = 0; i < 2 * ROWS; i++) {
            total[i] += simd_shuffle_xor(total[i], ushort(1));
            total[i] += simd_shuffle_xor(total[i], ushort(2));
            if (lane % 4 == 0) {
                sums[(i / 2) * EXL3_BLOCK + output + 8 * (i % 2)] = total[i];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint row = group; row < uint(ROWS); row += EXL3_SIMDGROUPS) {
            if (base + row >= count) {
                continue;
            }
            const uint pair = MODE == EXL3_TILES ? indices[first + base + row] : first + base + row;
            float v[4];
            for (uint i = 0; i < 4; i++) {
                v[i] = sums[row * EXL3_BLOCK + 4 * lane + i];
            }
            if (SPLITS == 1) {
                exl3_rotate(v, lane);
            }
            for (uint i = 0; i < 4; i++) {
                const uint out = block * EXL3_BLOCK + 4 * lane + i;
                if (SPLITS > 1) {
                    y[(ulong(split) * num_rows + pair) * WIDTH + out] = Y(v[i]);
                } else if (out < uint(OUT)) {
                    const float offset = BIASED ? float(bias[expert * OUT + out]) : 0.0f;
                    y[ulong(pair) * OUT + out] = Y(metal::fma(v[i], float(svh[expert * WIDTH + out]), offset));
                }
            }
        }
    }
