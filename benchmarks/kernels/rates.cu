// How many operations of one kind a multiprocessor does in a cycle: what decoding of packed weights is made of.
// KIND: 0 population count, 1 byte permutation, 2 load of 16 bits of shared memory, 3 shuffle, 4 multiply-add,
// 5 shift. Each thread has CHAINS independent values, so that it is not latency that is measured.
#include "common.cuh"

constexpr int CHAINS = 8;
constexpr u32 ROOM = 4096;

KERNEL(1024, 1) rates(u32* __restrict__ out, u32* __restrict__ cycles, u32 rounds) {
  DYNAMIC_SHARED(shared);
  for (u32 i = threadIdx.x; i < ROOM / 4; i += blockDim.x) ((u32*)shared)[i] = 0;
  __syncthreads();
  u32 values[CHAINS];
#pragma unroll
  for (int i = 0; i < CHAINS; i++) values[i] = threadIdx.x * 2 % 64 + i * 64;
  const long long begun = clock64();
#pragma unroll 4
  for (u32 round = 0; round < rounds; round++) {
#pragma unroll
    for (int i = 0; i < CHAINS; i++) {
#if KIND == 0
      asm volatile("popc.b32 %0, %0;" : "+r"(values[i]));
#elif KIND == 1
      asm volatile("prmt.b32 %0, %0, %1, 0x2143;" : "+r"(values[i]) : "r"(rounds));
#elif KIND == 2
      u32 loaded;
      asm volatile("ld.shared.u16 %0, [%1];" : "=r"(loaded) : "r"(shared_address(shared + values[i])));
      values[i] = values[i] + loaded;
#elif KIND == 3
      asm volatile("shfl.sync.idx.b32 %0, %0, %1, 31, -1;" : "+r"(values[i]) : "r"(threadIdx.x + 1));
#elif KIND == 4
      asm volatile("mad.lo.u32 %0, %0, %1, %1;" : "+r"(values[i]) : "r"(rounds));
#else
      asm volatile("shf.l.wrap.b32 %0, %0, %1, 5;" : "+r"(values[i]) : "r"(rounds));
#endif
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = (u32)(clock64() - begun);
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < CHAINS; i++) sum += values[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
