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
template <int WIDTH, int OUT, int SPLITS, int MODE, bool BIASED, typename Y>
[[kernel]] void custom_kernel_exl3_finish__256_136_2_0_1_float16_t_float_float16_t_float16_t_uint32_t_float16_t(
  const device float* parts [[buffer(0)]],
  const constant int* parts_shape [[buffer(1)]],
  const device float16_t* svh [[buffer(2)]],
  const device float16_t* bias [[buffer(3)]],
  const device uint32_t* indices [[buffer(4)]],
  device float16_t* y [[buffer(5)]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
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

}

template [[host_name("custom_kernel_exl3_finish__256_136_2_0_1_float16_t_float_float16_t_float16_t_uint32_t_float16_t")]] [[kernel]] decltype(custom_kernel_exl3_finish__256_136_2_0_1_float16_t_float_float16_t_float16_t_uint32_t_float16_t<256, 136, 2, 0, 1, float16_t>) custom_kernel_exl3_finish__256_136_2_0_1_float16_t_float_float16_t_float16_t_uint32_t_float16_t<256, 136, 2, 0, 1, float16_t>;
