// inputs @ weight.T for one token or two, where most weights are zero: each kept weight says in four bits how
// many zeros stand before it, and is multiplied by itself; nothing is done for a zero.
//
// A lane reads 8 weights at a time: 16 bytes of values and a word of gaps. Gaps 0..3 are the low halves of the
// word's bytes, gaps 4..7 the high ones, so that one product with 0x01010101 gives sums of four at once; sums
// over lanes give where a lane's weights begin. A warp takes a row of the weight after another, and reads
// ahead over the ends of rows.
//
// The inputs lie in shared memory as words, SPREAD rows of them: input p in row p % SPREAD, column p / SPREAD,
// rows a multiple of 32 words long. Neighbouring lanes are about 8 / (1 - zero fraction) inputs apart, and so
// in neighbouring banks where SPREAD is near that. Past the last input there are zeros for what fills rows up.
#include "common.cuh"

constexpr u32 WARPS = 12;
constexpr int AHEAD = 4;  // blocks of 8 weights a lane in flight
constexpr u32 SPREAD = 1 << SPREAD_BITS;

struct Ahead {
  uint4 values;
  u32 gaps;
  u32 left;  // groups of 8 of the row, this block's and those after it
};

INLINE void stage(u32* staged, const u16* x, u32 pitch, u32 inputs, u32 width) {
  for (u32 column = threadIdx.x; column < pitch; column += WARPS * WARP)
#pragma unroll 4
    for (u32 row = 0; row < SPREAD; row++) {
      const u32 input = column * SPREAD + row;
      u32 word = 0;
      if (input < inputs) {
#if TOKENS == 1
        word = __float_as_uint(wide(x[input]));
#else
        word = x[input] | (u32)x[width + input] << 16;
#endif
      }
      staged[row * pitch + column] = word;
    }
}

INLINE u32 place_of(u32 first, u32 sums, int i) { return first + select_bytes(sums, 0, 0x4440 | i) + i; }

// Adds what a lane's 8 weights give; place is where the row stands, and moves on.
INLINE void add(float (&sums)[TOKENS], const Ahead& now, u32& place, u32 staged, u32 row_bytes) {
  const u32 low = (now.gaps & 0x0f0f0f0fu) * 0x01010101u, high = (now.gaps >> 4 & 0x0f0f0f0fu) * 0x01010101u;
  const u32 zeros = low >> 24;
  const u32 length = threadIdx.x % WARP < now.left ? zeros + (high >> 24) + 8 : 0;
  const u32 until = sum_to_here(length);
  const u32 first = place + until - length, second = first + zeros + 4;
  place += __shfl_sync(ALL_LANES, until, 31);
  const u32 words[4] = {now.values.x, now.values.y, now.values.z, now.values.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 input = i < 4 ? place_of(first, low, i) : place_of(second, high, i - 4);
    const u32 column = input >> SPREAD_BITS;
    const u32 x = load_shared(multiply_add(column, 4 - SPREAD * row_bytes, multiply_add(input, row_bytes, staged)));
    const float value = wide((u16)(words[i / 2] >> i % 2 * 16));
#if TOKENS == 1
    sums[0] = fmaf(value, __uint_as_float(x), sums[0]);
#else
    sums[0] = fmaf(value, wide((u16)x), sums[0]);
    sums[1] = fmaf(value, wide((u16)(x >> 16)), sums[1]);
#endif
  }
}

KERNEL(WARPS * 32, 2)
gap_linear(const uint4* __restrict__ values, const u32* __restrict__ gaps, const u32* __restrict__ starts,
           const u16* __restrict__ x, const u16* __restrict__ bias, u16* __restrict__ out, u32 pitch, u32 inputs,
           u32 width, u32 outputs) {
  DYNAMIC_SHARED(shared);
  u32* staged = (u32*)shared;
  const u32 lane = threadIdx.x % WARP, stride = gridDim.x * WARPS;
  u32 row = warp_of_block() * gridDim.x + blockIdx.x;  // neighbours on different multiprocessors

  // What is read next: group `at` of row `ahead`; the row after it is known one row early.
  u32 ahead = row, at = 0, end = 0, next_at = 0, next_end = 0;
  auto look = [&](u32 of) {
    next_at = next_end = 0;
    if (of < outputs) next_at = starts[of], next_end = starts[of + 1];
  };
  look(ahead);
  at = next_at, end = next_end;
  look(ahead + stride);
  auto fetch = [&](Ahead& slot) {
    slot.values = make_uint4(0, 0, 0, 0);
    slot.gaps = 0;
    slot.left = end - at;
    if (lane < slot.left) {
      const u32 group = at + lane;
      slot.values = load_once(values + group);
      slot.gaps = load_once(gaps + group);
    }
    at += WARP;
    if (at >= end) {
      ahead += stride, at = next_at, end = next_end;
      look(ahead + stride);
    }
  };

  Ahead ring[AHEAD];
#pragma unroll
  for (int j = 0; j < AHEAD; j++) fetch(ring[j]);
  stage(staged, x, pitch, inputs, width);
  __syncthreads();

  float sums[TOKENS] = {};
  u32 place = 0;
#pragma unroll 1
  while (row < outputs) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      if (row >= outputs) break;
      add(sums, ring[j], place, shared_address(staged), pitch * 4);
      const bool is_last = ring[j].left <= WARP;
      fetch(ring[j]);
      if (is_last) {
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
          float sum = sums[token];
#pragma unroll
          for (u32 mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
          if (lane == 0) out[(u64)token * outputs + row] = narrow(bias ? sum + wide(bias[row]) : sum);
          sums[token] = 0.0f;
        }
        place = 0;
        row += stride;
      }
    }
  }
}
