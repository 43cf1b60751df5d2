// What the kernels share: short names, 16-bit floats, loads that pass the L1 cache by, tensor-core
// instructions, copies that a barrier tells the end of. No header of a toolkit is needed.
//
// Everything the compiler of a GPU alone understands is here. HOST_LANES leaves it out, and whoever defines
// that gives functions of the same names: so the kernels themselves run, unchanged, where there is no GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

#ifndef HOST_LANES

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define INLINE __device__ __forceinline__
#define INLINE_MEMBER __device__ __forceinline__

INLINE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

INLINE u32 load_shared(u32 address) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

INLINE uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

INLINE u32 load_once(const u32* from) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// a * b + c, and bytes of two words by a selector: as one instruction each, which compilers else take apart.
INLINE u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 sum;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

INLINE u32 select_bytes(u32 low, u32 high, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

INLINE float wide(u16 value) {
#if BF16
  return __uint_as_float((u32)value << 16);
#else
  float wider;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wider) : "h"(value));
  return wider;
#endif
}

INLINE u16 narrow(float value) {
  u16 narrower;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrower) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrower) : "f"(value));
#endif
  return narrower;
}

#if BF16
#define FLOAT16 "bf16"
#else
#define FLOAT16 "f16"
#endif

// sums += a (16x16, row) * b (16x8, column); the places of the elements are in fragment_linear.cu and tile_linear.cu.
INLINE void multiply(float (&sums)[4], const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." FLOAT16 "." FLOAT16 ".f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sums += a (16x32, 2:4) * b (32x8); HALF says which two lanes of each four hold the places.
template <int HALF>
INLINE void multiply_sparse(float (&sums)[4], const uint4& a, const uint4& b, u32 places) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." FLOAT16 "." FLOAT16 ".f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
                 "r"(places), "n"(HALF));
}

// The sum of value over this lane and those before it.
INLINE u32 sum_to_here(u32 value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    asm volatile("{.reg .pred inside; .reg .u32 other;"
                 " shfl.sync.up.b32 other|inside, %0, %1, 0, -1; @inside add.u32 %0, %0, other;}"
                 : "+r"(value) : "r"(step));
  return value;
}

// A ring of copies into shared memory: the copy engine with a barrier where there is one, else each lane's own.
#if __CUDA_ARCH__ >= 900
INLINE void barrier_begin(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One lane calls it; bytes are a multiple of 16.
INLINE void copy_begin(void* to, const void* from, u32 bytes, u64* barrier) {
  const u32 bar = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(bar) : "memory");
}

INLINE void barrier_wait(u64* barrier, u32 parity) {
  const u32 bar = shared_address(barrier);
  u32 done = 0;
  while (!done)
    asm volatile("{.reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;"
                 " selp.b32 %0, 1, 0, over;}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
}
#endif

INLINE void copy_lane(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
INLINE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#endif  // HOST_LANES

// Which warp of the block this is; said so that the compiler knows it to be the same for all of its lanes.
INLINE u32 warp_of_block() { return __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0); }

// Sums of a strip of 16 outputs, one warp's share of the inputs each, put together and written.
//
// A warp holds of 8 tokens: sums[0], [1] of output lane / 4 and tokens 2 * (lane % 4), + 1; [2], [3] of output
// lane / 4 + 8. Tokens are STRIDE words apart in shared memory, so that no two lanes meet in a bank.
constexpr u32 STRIP = 16;
constexpr u32 STRIDE = 20;

struct Result {
  const u16* bias;  // (outputs) or null
  u16* out;         // (tokens, outputs)
  float* parts;     // (chunks of inputs, tokens, outputs), written instead of out where not null
  u32 tokens, outputs;
};

template <int BLOCKS, int WARPS>
INLINE void put_together(float (&sums)[BLOCKS][4], float* room, u32 strip, u32 chunk, const Result& result) {
  const u32 lane = threadIdx.x % WARP, warp = warp_of_block();
  float* mine = room + warp * (BLOCKS * 8 * STRIDE);
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      mine[(b * 8 + lane % 4 * 2 + j % 2) * STRIDE + lane / 4 + j / 2 * 8] = sums[b][j];
      sums[b][j] = 0.0f;
    }
  __syncthreads();
#pragma unroll 1
  for (u32 i = threadIdx.x; i < BLOCKS * 8 * STRIP; i += WARPS * WARP) {
    const u32 token = i / STRIP, row = i % STRIP, output = strip * STRIP + row;
    if (token < result.tokens && output < result.outputs) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += room[(w * BLOCKS * 8 + token) * STRIDE + row];
      const u64 at = (u64)token * result.outputs + output;
      if (result.parts)
        result.parts[(u64)chunk * result.tokens * result.outputs + at] = sum;
      else
        result.out[at] = narrow(result.bias ? sum + wide(result.bias[output]) : sum);
    }
  }
  __syncthreads();
}
