    // One threadgroup sorts the pairs (token, choice) by expert, each expert's in the order of the tokens, and cuts
    // them into tiles of at most TILE. order: the pairs sorted; tiles: how many there are, then four numbers each:
    // expert, first place in order, pairs, 0. Nothing but whole numbers, no atomics.
    threadgroup uint counts[E];
    threadgroup uint places[E];
    threadgroup uint firsts[E];
    const uint lane = thread_index_in_simdgroup;
    const uint num_pairs = uint(indices_shape[0]) * TOPK;
    for (uint e = simdgroup_index_in_threadgroup; e < uint(E); e += simdgroups_per_threadgroup) {
        uint mine = 0;
        for (uint pair = lane; pair < num_pairs; pair += threads_per_simdgroup) {
            mine += indices[pair] == e ? 1 : 0;
        }
        mine = simd_sum(mine);
        if (lane == 0) {
            counts[e] = mine;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup_index_in_threadgroup == 0) {
        uint num_placed = 0, num_tiles = 0;
        for (uint base = 0; base < uint(E); base += threads_per_simdgroup) {
            const uint count = base + lane < uint(E) ? counts[base + lane] : 0;
            const uint cut = (count + TILE - 1) / TILE;
            const uint place = num_placed + simd_prefix_exclusive_sum(count);
            const uint first = num_tiles + simd_prefix_exclusive_sum(cut);
            if (base + lane < uint(E)) {
                places[base + lane] = place;
                firsts[base + lane] = first;
            }
            num_placed += simd_sum(count);
            num_tiles += simd_sum(cut);
        }
        if (lane == 0) {
            tiles[0] = num_tiles;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = simdgroup_index_in_threadgroup; e < uint(E); e += simdgroups_per_threadgroup) {
        const uint count = counts[e];
        if (count == 0) {
            continue;
        }
        uint place = places[e];
        for (uint base = 0; base < num_pairs; base += threads_per_simdgroup) {
            const uint pair = base + lane;
            const uint mine = pair < num_pairs && indices[pair] == e ? 1 : 0;
            const uint before = simd_prefix_exclusive_sum(mine);
            if (mine) {
                order[place + before] = pair;
            }
            place += simd_sum(mine);
        }
        for (uint cut = lane; cut * TILE < count; cut += threads_per_simdgroup) {
            const uint at = 4 * (1 + firsts[e] + cut);
            tiles[at] = e;
            tiles[at + 1] = places[e] + cut * TILE;
            tiles[at + 2] = metal::min(count - cut * TILE, uint(TILE));
            tiles[at + 3] = 0;
        }
    }
