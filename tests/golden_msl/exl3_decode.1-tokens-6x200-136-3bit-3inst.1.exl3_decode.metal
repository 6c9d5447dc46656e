// EXL3 (trellis) weights out of their tiles; kernels/exl3_reference.py says what a tile is.

enum { EXL3_3INST = 0, EXL3_MCG = 1, EXL3_MUL1 = 2 };
enum { EXL3_SINGLE = 0, EXL3_PAIRS = 1, EXL3_TILES = 2 };
// A tile's side; channels that are rotated together, and their tiles; simdgroups of a threadgroup.
enum { EXL3_TILE = 16, EXL3_BLOCK = 128, EXL3_BLOCK_TILES = 8, EXL3_SIMDGROUPS = 8 };
enum { EXL3_CHUNK_BLOCKS = 4, EXL3_CHUNK = 512 };

// What a codebook makes of a state of 16 bits.
template <int BOOK>
METAL_FUNC half exl3_value(uint state) {
  if (BOOK == EXL3_MUL1) {
    const uint x = state * 0x83DCD12Du;
    const uint pairs = (x & 0x00ff00ffu) + ((x >> 8) & 0x00ff00ffu);
    const uint total = (pairs + (pairs >> 16)) & 0xffffu;
    return metal::fma(
        as_type<half>(ushort(0x6400u + total)), as_type<half>(ushort(0x1eee)), as_type<half>(ushort(0xc931)));
  }
  uint x = BOOK == EXL3_MCG ? state * 0xCBAC1FEDu : state * 89226354u + 64248484u;
  x = (x & 0x8fff8fffu) ^ 0x3b603b60u;
  return as_type<half>(ushort(x & 0xffffu)) + as_type<half>(ushort(x >> 16));
}

// The part of a tile that one lane decodes: weights 8 lane to 8 lane + 7, whose states are a window of 7 BITS + 16
// bits in two or three words of the circular stream.
template <int BITS, int BOOK>
struct Exl3Lane {
  enum { WORDS = 8 * BITS, COUNT = BITS <= 4 ? 2 : 3 };
  uint at[3];
  uint shift;

  METAL_FUNC void start(uint lane) {
    const uint bit = (8 * BITS * lane + 256 * BITS + BITS - 16) % (256 * BITS);
    shift = bit % 32;  // never 0: 8 BITS lane + BITS - 16 is odd, or even and no multiple of 32
    for (int i = 0; i < 3; i++) {
      at[i] = (bit / 32 + i) % WORDS;
    }
  }

  METAL_FUNC void decode(const device uint* tile, thread half* values) {
    const uint a = tile[at[0]], b = tile[at[1]], c = COUNT == 3 ? tile[at[2]] : 0;
    uint window[3];
    window[0] = (a << shift) | (b >> (32 - shift));
    window[1] = COUNT == 3 ? (b << shift) | (c >> (32 - shift)) : b << shift;
    window[2] = c << shift;
    for (int j = 0; j < 8; j++) {
      const int word = j * BITS / 32, first = j * BITS % 32;
      const uint next = word < 2 ? window[word + 1] : 0;
      const uint state = first <= 16 ? window[word] >> (16 - first)
                                     : (window[word] << (first - 16)) | (next >> (48 - first));
      values[j] = exl3_value<BOOK>(state & 0xffffu);
    }
  }
};

// A simdgroup rotates one block: each lane has four channels in a row.
METAL_FUNC void exl3_rotate(thread float* v, uint lane) {
  const float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
  v[0] = a + c;
  v[1] = b + d;
  v[2] = a - c;
  v[3] = b - d;
  for (uint mask = 1; mask < 32; mask *= 2) {
    for (int i = 0; i < 4; i++) {
      const float other = simd_shuffle_xor(v[i], ushort(mask));
      v[i] = lane & mask ? other - v[i] : v[i] + other;
    }
  }
  for (int i = 0; i < 4; i++) {
    v[i] *= 0.08838834764831845f;
  }
}
template <int WIDTH, int OUT, int SPLITS, int MODE, bool BIASED, int BITS, int BOOK, int ROWS, int IN, int HEIGHT, int SHARE, typename Y>
[[kernel]] void custom_kernel_exl3_decode__256_136_1_1_1_3_0_1_200_256_3_float16_t_float16_t_int16_t_float16_t_float16_t_float16_t_uint32_tc_uint32_t_float16_t(
  const device float16_t* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  const device int16_t* trellis [[buffer(2)]],
  const device float16_t* suh [[buffer(3)]],
  const device float16_t* svh [[buffer(4)]],
  const device float16_t* bias [[buffer(5)]],
  const constant uint32_t* indices [[buffer(6)]],
  const device uint32_t* tiles [[buffer(7)]],
  device float16_t* y [[buffer(8)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
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

}

template [[host_name("custom_kernel_exl3_decode__256_136_1_1_1_3_0_1_200_256_3_float16_t_float16_t_int16_t_float16_t_float16_t_float16_t_uint32_tc_uint32_t_float16_t")]] [[kernel]] decltype(custom_kernel_exl3_decode__256_136_1_1_1_3_0_1_200_256_3_float16_t_float16_t_int16_t_float16_t_float16_t_float16_t_uint32_tc_uint32_t_float16_t<256, 136, 1, 1, 1, 3, 0, 1, 200, 256, 3, float16_t>) custom_kernel_exl3_decode__256_136_1_1_1_3_0_1_200_256_3_float16_t_float16_t_int16_t_float16_t_float16_t_float16_t_uint32_tc_uint32_t_float16_t<256, 136, 1, 1, 1, 3, 0, 1, 200, 256, 3, float16_t>;
