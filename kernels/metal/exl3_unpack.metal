    // weights (experts, HEIGHT, WIDTH) float16 between the rotations: a threadgroup decodes eight tiles side by side and
    // writes their 16 rows in whole pieces.
    enum { NUM_WEIGHTS = EXL3_TILE * EXL3_BLOCK };
    threadgroup half rows[NUM_WEIGHTS];
    const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    const uint block = threadgroup_position_in_grid.x, down = threadgroup_position_in_grid.y;
    const ulong expert = threadgroup_position_in_grid.z;
    const uint across = WIDTH / EXL3_TILE, height = HEIGHT / EXL3_TILE;
    Exl3Lane<BITS, BOOK> own;
    own.start(lane);
    half values[8];
    own.decode(
        (const device uint*)trellis +
            ((expert * height + down) * across + block * EXL3_BLOCK_TILES + group) * (8 * BITS),
        values);
    threadgroup half* corner = rows + 2 * (lane % 4) * EXL3_BLOCK + group * EXL3_TILE + lane / 4;
    for (uint j = 0; j < 8; j++) {
        corner[(j % 2 + 8 * (j / 2 % 2)) * EXL3_BLOCK + 8 * (j / 4)] = values[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    device half* target = weights + (expert * HEIGHT + down * EXL3_TILE) * WIDTH + block * EXL3_BLOCK;
    for (uint i = thread_index_in_threadgroup; i < NUM_WEIGHTS; i += EXL3_SIMDGROUPS * 32) {
        target[ulong(i / EXL3_BLOCK) * WIDTH + i % EXL3_BLOCK] = rows[i];
    }
