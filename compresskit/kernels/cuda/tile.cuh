// The layout `tile`: packets of 16 outputs x 128 inputs, read whole, and decoded to what tensor cores take.
//
// A packet is two tiles of 16 outputs x 64 inputs: 32 words of mask bits for either, then the kept values of
// both, to a multiple of 16 bytes. A tile is 8 groups of 128 weights, a group 4 weights for each lane: of bit
// i, group = i / 128, lane = i % 128 / 4 and j = i % 4 say that it stands for
//   output lane / 4 + 8 * (j / 2),  input 16 * (lane % 4) + 2 * group + j % 2.
// Groups 2 m and 2 m + 1 are the operand of one mma.m16n8k16, whose registers hold, by the PTX ISA and with
// place = lane % 4, output lane / 4 (registers 0, 2) or lane / 4 + 8 (1, 3), columns 2 * place and the next
// (0, 1) or those 8 further on (2, 3). Which inputs are called which columns is free as long as the other
// operand does the same: so each lane has 16 inputs in a row, and takes them from x as they lie.
#pragma once
#include "common.cuh"

constexpr u32 TILE_INPUTS = 64;
constexpr u32 STEP_INPUTS = 2 * TILE_INPUTS;
constexpr u32 MASK_BYTES = 128;  // of a tile

INLINE u32 value_at(const u8* values, u32 offset) { return *(const u16*)(values + offset); }

// Four weights of a lane as two registers: word >> shift says which of them are kept, offset where the first
// value is. Values are loaded whether kept or not, and what is not kept is made zero by the selector: bytes 2
// and 3 of a 16-bit value in a register are zero, 0x2222 takes those, and a kept value changes its two digits.
INLINE void decode_four(const u8* values, u32 offset, u32 word, u32 shift, u32& low, u32& high) {
  const u32 bits = word >> shift, shifted = bits >> 1;
  const u32 b0 = bits & 1, b1 = bits & 2, b2 = shifted & 2, b3 = bits & 8;  // times 1, 2, 2, 8
  const u32 second = multiply_add(b0, 2, offset), third = second + b1, fourth = third + b2;
  const u32 v0 = value_at(values, offset), v1 = value_at(values, second);
  const u32 v2 = value_at(values, third), v3 = value_at(values, fourth);
  low = select_bytes(v0, v1, multiply_add(b1, 0x1900, multiply_add(b0, 0u - 0x12u, 0x2222)));
  high = select_bytes(v2, v3, multiply_add(b3, 0x640, multiply_add(b2, 0u - 0x09u, 0x2222)));
}

// A tile as four operands of multiply. offset is where its values begin, and moves on to the next tile's.
INLINE void decode_tile(const u8* packet, const u8* values, u32 tile, u32& offset, u32 (&weights)[16]) {
  const u32 lane = threadIdx.x % WARP;
  const u32 shift = lane % 8 * 4, below = (1u << shift) - 1;
  const u32 word = ((const u32*)(packet + tile * MASK_BYTES))[lane];
  const u32 count = __popc(word), until = sum_to_here(count);
  const u32 begin = offset + (until - count) * 2;
  offset += __shfl_sync(ALL_LANES, until, 31) * 2;
#pragma unroll
  for (u32 group = 0; group < 8; group++) {
    const u32 from = group * 4 + lane / 8;
    const u32 theirs = __shfl_sync(ALL_LANES, word, from);
    const u32 at = multiply_add(__popc(theirs & below), 2, __shfl_sync(ALL_LANES, begin, from));
    decode_four(values, at, theirs, shift, weights[group * 2], weights[group * 2 + 1]);
  }
}

// A warp's ring of packets in shared memory, filled ahead of their use. Where packets begin is told in units
// of 16 bytes, and looked up one packet before it is needed.
template <int SLOTS>
struct Ring {
  const u8* packets;
  const u32* starts;
  u8* slots;
  u64* barriers;
  u32 slot_bytes;
  u32 filled = 0, used = 0, parity = 0;
  u32 at = 0, end = 0;  // of the packet that is read next

  INLINE_MEMBER void begin() {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % WARP == 0)
      for (int i = 0; i < SLOTS; i++) barrier_begin(barriers + i);
    __syncwarp();
#endif
  }

  // Tells the packet that the next fill reads; there is none past the last one.
  INLINE_MEMBER void look(bool is_one, u64 packet) {
    at = end = 0;
    if (is_one) at = starts[packet], end = starts[packet + 1];
  }

  INLINE_MEMBER void fill() {
    u8* slot = slots + filled * slot_bytes;
    const u8* from = packets + (u64)at * 16;
#if __CUDA_ARCH__ >= 900
    if (end > at && threadIdx.x % WARP == 0) copy_begin(slot, from, (end - at) * 16, barriers + filled);
#else
    for (u32 i = threadIdx.x % WARP; i < end - at; i += WARP) copy_lane(slot + i * 16, from + i * 16);
    copy_commit();
#endif
    filled = filled + 1 == SLOTS ? 0 : filled + 1;
  }

  INLINE_MEMBER const u8* wait() {
#if __CUDA_ARCH__ >= 900
    barrier_wait(barriers + used, parity);
#else
    copy_wait<SLOTS - 1>();
    __syncwarp();
#endif
    return slots + used * slot_bytes;
  }

  // The packet of the last wait is not needed any more.
  INLINE_MEMBER void release() {
    __syncwarp();
    if (++used == SLOTS) used = 0, parity ^= 1;
  }
};
