// inputs @ weight.T for up to 16 tokens and zeros that lie anywhere: masks and kept values are read once, made
// to operands of tensor cores in registers, and multiplied.
//
// A block of threads takes strips of 16 outputs in turns, and its warps take the packets of a strip in turns.
// The inputs of its chunk lie in shared memory as they are, rows of tokens 16 bytes longer than need be so
// that no two lanes meet in a bank.
#include "tile.cuh"

constexpr int BLOCKS = TOKEN_BLOCKS;  // of 8 tokens
constexpr int WARPS = 8;
constexpr int SLOTS = RING_SLOTS;
constexpr u32 PIECE = 8;  // inputs in 16 bytes

// inputs is a multiple of 8, and x is aligned to 16 bytes.
INLINE void stage(u8* staged, u32 row_bytes, const uint4* x, u32 first, u32 width, u32 tokens, u32 inputs) {
  for (u32 token = 0; token < tokens; token++) {
    const uint4* row = x + (u64)token * (inputs / PIECE);
#pragma unroll 2
    for (u32 i = threadIdx.x; i < width / PIECE; i += WARPS * WARP) {
      const u32 input = first + i * PIECE;
      ((uint4*)(staged + token * row_bytes))[i] = input < inputs ? row[input / PIECE] : make_uint4(0, 0, 0, 0);
    }
  }
}

KERNEL(WARPS * 32, 2)
tile_linear(const u8* __restrict__ packets, const u32* __restrict__ starts, const uint4* __restrict__ x,
            const u16* __restrict__ bias, u16* __restrict__ out, float* __restrict__ parts, u32 slot_bytes,
            u32 strips, u32 steps, u32 chunk_steps, u32 tokens, u32 inputs, u32 outputs) {
  DYNAMIC_SHARED(shared);
  float* room = (float*)shared;
  u8* slots = shared + WARPS * BLOCKS * 8 * STRIDE * 4;
  u64* barriers = (u64*)(slots + WARPS * SLOTS * slot_bytes);
  u8* staged = (u8*)(barriers + WARPS * 4);
  const u32 lane = threadIdx.x % WARP, warp = warp_of_block();
  const u32 begin = blockIdx.y * chunk_steps;
  const u32 count = steps - begin < chunk_steps ? steps - begin : chunk_steps;
  const u32 row_bytes = chunk_steps * STEP_INPUTS * 2 + 16;

  Ring<SLOTS> ring = {packets, starts, slots + warp * SLOTS * slot_bytes, barriers + warp * 4, slot_bytes};
  ring.begin();
  u32 ahead = warp < count ? blockIdx.x : strips, next = warp;
  auto look = [&] { ring.look(ahead < strips, (u64)ahead * (steps + 1) + begin + next); };
  auto fetch = [&] {
    ring.fill();
    next += WARPS;
    if (next >= count) next = warp, ahead += gridDim.x;
    look();
  };
  look();
  for (int i = 0; i < SLOTS; i++) fetch();
  stage(staged, row_bytes, x, begin * STEP_INPUTS, count * STEP_INPUTS, tokens, inputs);
  __syncthreads();

  const Result result = {bias, out, parts, tokens, outputs};
  float sums[BLOCKS][4] = {};
#pragma unroll 1
  for (u32 strip = blockIdx.x; strip < strips; strip += gridDim.x) {
#pragma unroll 1
    for (u32 step = warp; step < count; step += WARPS) {
      const u8* packet = ring.wait();
      u32 offset = 0;
#pragma unroll
      for (u32 tile = 0; tile < 2; tile++) {
        u32 weights[16];
        decode_tile(packet, packet + 2 * MASK_BYTES, tile, offset, weights);
        const u8* column = staged + (step * STEP_INPUTS + tile * TILE_INPUTS + lane % 4 * 16) * 2;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          uint4 first = make_uint4(0, 0, 0, 0), second = first;
          const u32 token = b * 8 + lane / 4;
          if (token < tokens) {
            first = ((const uint4*)(column + token * row_bytes))[0];
            second = ((const uint4*)(column + token * row_bytes))[1];
          }
          multiply(sums[b], weights, first.x, first.y);
          multiply(sums[b], weights + 4, first.z, first.w);
          multiply(sums[b], weights + 8, second.x, second.y);
          multiply(sums[b], weights + 12, second.z, second.w);
        }
      }
      ring.release();
      fetch();
    }
    put_together<BLOCKS, WARPS>(sums, room, strip, blockIdx.y, result);
  }
}
