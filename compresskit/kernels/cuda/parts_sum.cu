// Sums over chunks of the inputs to outputs: parts (chunks, tokens, outputs) fp32 -> out (tokens, outputs).
#include "common.cuh"

KERNEL(256, 1)
parts_sum(const float* __restrict__ parts, const u16* __restrict__ bias, u16* __restrict__ out, u32 chunks,
          u32 tokens, u32 outputs) {
  const u64 size = (u64)tokens * outputs;
  const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= size) return;
  float sum = 0.0f;
  for (u32 chunk = 0; chunk < chunks; chunk++) sum += parts[chunk * size + at];
  out[at] = narrow(bias ? sum + wide(bias[at % outputs]) : sum);
}
