// inputs @ weight.T for a 2:4 weight and few tokens, on sparse tensor cores: the weight is read once, in the
// order in which a warp's registers want it, straight from memory.
//
// One mma.sp.m16n8k32 multiplies 16 outputs x 32 inputs by 32 inputs x 8 tokens. With group = lane / 4 and
// place = lane % 4, its operands are, by the PTX ISA:
//   weight: register r holds the two kept values of output group + 8 * (r % 2) among inputs 4 * place + 16 *
//           (r / 2) and the three after it;
//   inputs: register r holds inputs 2 * place + 8 * r and the next one, of token group;
//   places: a lane's word has output group in its low half and output group + 8 in its high half; four bits
//           for each four inputs, two for each kept value, the lower one first. Lanes of place 0 speak of
//           inputs 0..15 and those of place 1 of 16..31 (HALF 0), or those of places 2 and 3 (HALF 1);
//   sums:   0 and 1 are of output group, tokens 2 * place and the next; 2 and 3 of output group + 8.
// A step is 64 inputs: two instructions, whose places share one word of every lane.
//
// A block of threads takes strips of 16 outputs in turns, and its warps take the steps of a strip in turns. The inputs
// of its chunk lie in shared memory as registers want them: [32 inputs][token][place], 16 bytes each.
#include "common.cuh"

constexpr int BLOCKS = TOKEN_BLOCKS;  // of 8 tokens
constexpr int WARPS = 8;
constexpr int AHEAD = 4;  // steps in flight
constexpr u32 STEP = 64;
constexpr u32 NO_PLACES = 0x44444444u;  // the first two of each four: what there is beside zeros

struct Ahead {
  uint4 low, high;
  u32 places;
};

INLINE u32 pair_at(const u32* row, u32 input, u32 inputs) { return input < inputs ? row[input / 2] : 0u; }

// inputs is even, and x is aligned to 4 bytes.
INLINE void stage(uint4* staged, const u32* x, u32 first, u32 halves, u32 tokens, u32 inputs) {
  for (u32 token = 0; token < tokens; token++) {
    const u32* row = x + (u64)token * (inputs / 2);
#pragma unroll 2
    for (u32 i = threadIdx.x; i < halves * 4; i += WARPS * WARP) {
      const u32 input = first + i / 4 * 32 + i % 4 * 2;
      staged[(i / 4 * tokens + token) * 4 + i % 4] =
          make_uint4(pair_at(row, input, inputs), pair_at(row, input + 8, inputs),
                     pair_at(row, input + 16, inputs), pair_at(row, input + 24, inputs));
    }
  }
}

KERNEL(WARPS * 32, BLOCKS < 8 ? 2 : 1)
fragment_linear(const uint4* __restrict__ values, const u32* __restrict__ places, const u32* __restrict__ x,
                const u16* __restrict__ bias, u16* __restrict__ out, float* __restrict__ parts, u32 strips,
                u32 steps, u32 chunk_steps, u32 tokens, u32 inputs, u32 outputs) {
  DYNAMIC_SHARED(shared);
  float* room = (float*)shared;
  uint4* staged = (uint4*)(shared + WARPS * BLOCKS * 8 * STRIDE * 4);
  const u32 lane = threadIdx.x % WARP, warp = warp_of_block();
  const u32 begin = blockIdx.y * chunk_steps;
  const u32 count = steps - begin < chunk_steps ? steps - begin : chunk_steps;
  const u32 share = (count + WARPS * AHEAD - 1) / (WARPS * AHEAD) * AHEAD;  // steps of a warp in a strip

  // What is read next: the step `next` of this warp, in strip `ahead`.
  u32 ahead = blockIdx.x, next = warp;
  auto fetch = [&](Ahead& slot) {
    slot.low = slot.high = make_uint4(0, 0, 0, 0);
    slot.places = NO_PLACES;
    if (ahead < strips && next < count) {
      const u64 at = (u64)ahead * steps + begin + next;
      slot.low = load_once(values + at * 64 + lane);
      slot.high = load_once(values + at * 64 + 32 + lane);
      slot.places = load_once(places + at * 32 + lane);
    }
    next += WARPS;
    if (next >= share * WARPS) next = warp, ahead += gridDim.x;
  };

  Ahead ring[AHEAD];
#pragma unroll
  for (int j = 0; j < AHEAD; j++) fetch(ring[j]);
  stage(staged, x, begin * STEP, count * 2, tokens, inputs);
  __syncthreads();

  const Result result = {bias, out, parts, tokens, outputs};
  float sums[BLOCKS][4] = {};
#pragma unroll 1
  for (u32 strip = blockIdx.x; strip < strips; strip += gridDim.x) {
#pragma unroll 1
    for (u32 step = warp; step < share * WARPS; step += WARPS * AHEAD) {
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        const Ahead now = ring[j];
        fetch(ring[j]);
        const u32 half = step + j * WARPS < count ? (step + j * WARPS) * 2 : 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          uint4 first = make_uint4(0, 0, 0, 0), second = first;
          const u32 token = b * 8 + lane / 4;
          if (token < tokens) {
            first = staged[(half * tokens + token) * 4 + lane % 4];
            second = staged[((half + 1) * tokens + token) * 4 + lane % 4];
          }
          multiply_sparse<0>(sums[b], now.low, first, now.places);
          multiply_sparse<1>(sums[b], now.high, second, now.places);
        }
      }
    }
    put_together<BLOCKS, WARPS>(sums, room, strip, blockIdx.y, result);
  }
}
