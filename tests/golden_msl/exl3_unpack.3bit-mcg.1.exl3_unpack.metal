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
template <int BITS, int BOOK, int HEIGHT, int WIDTH>
[[kernel]] void custom_kernel_exl3_unpack__3_1_128_256_int16_t_float16_t(
  const device int16_t* trellis [[buffer(0)]],
  device float16_t* weights [[buffer(1)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
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

}

template [[host_name("custom_kernel_exl3_unpack__3_1_128_256_int16_t_float16_t")]] [[kernel]] decltype(custom_kernel_exl3_unpack__3_1_128_256_int16_t_float16_t<3, 1, 128, 256>) custom_kernel_exl3_unpack__3_1_128_256_int16_t_float16_t<3, 1, 128, 256>;
