// The dense weight of the layout `tile`, for so many tokens that making it costs less than it saves: each warp
// decodes packets, and a lane writes 16 inputs in a row of two outputs.
#include "tile.cuh"

constexpr int WARPS = 8;
constexpr int SLOTS = RING_SLOTS;

// 16 weights of one output, of which left are not past the last input; aligned says that rows begin at 16 bytes.
INLINE void write_row(u16* to, const u32 (&weights)[16], int half, u32 left, bool aligned) {
  if (aligned && left >= 16) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      ((uint4*)to)[i] = make_uint4(weights[i * 8 + half], weights[i * 8 + half + 2], weights[i * 8 + half + 4],
                                   weights[i * 8 + half + 6]);
  } else {
#pragma unroll
    for (u32 i = 0; i < 16; i++)
      if (i < left) to[i] = (u16)(weights[i / 2 * 2 + half] >> i % 2 * 16);
  }
}

KERNEL(WARPS * 32, 2)
tile_expand(const u8* __restrict__ packets, const u32* __restrict__ starts, u16* __restrict__ out, u32 slot_bytes,
            u32 steps, u32 count, u32 inputs, u32 outputs) {
  DYNAMIC_SHARED(slots);
  u64* barriers = (u64*)(slots + WARPS * SLOTS * slot_bytes);
  const u32 lane = threadIdx.x % WARP, warp = warp_of_block();
  const bool aligned = inputs % 8 == 0;
  Ring<SLOTS> ring = {packets, starts, slots + warp * SLOTS * slot_bytes, barriers + warp * 4, slot_bytes};
  ring.begin();
  const u32 stride = gridDim.x * WARPS;
  u32 ahead = blockIdx.x * WARPS + warp;
  const u32 mine = ahead;
  auto look = [&] { ring.look(ahead < count, ahead + ahead / steps); };
  auto fetch = [&] {
    ring.fill();
    ahead += stride;
    look();
  };
  look();
  for (int i = 0; i < SLOTS; i++) fetch();
#pragma unroll 1
  for (u32 at = mine; at < count; at += stride) {
    const u8* packet = ring.wait();
    const u32 output = at / steps * STRIP + lane / 4;
    u32 offset = 0;
#pragma unroll
    for (u32 tile = 0; tile < 2; tile++) {
      u32 weights[16];
      decode_tile(packet, packet + 2 * MASK_BYTES, tile, offset, weights);
      const u32 input = at % steps * STEP_INPUTS + tile * TILE_INPUTS + lane % 4 * 16;
      const u32 left = input < inputs ? inputs - input : 0;
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (output + half * 8 < outputs)
          write_row(out + (u64)(output + half * 8) * inputs + input, weights, half, left, aligned);
    }
    ring.release();
    fetch();
  }
}
