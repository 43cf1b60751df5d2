// A GPU played by one CPU thread: every lane is a fiber, and what lanes do together is done as the PTX ISA says.
//
// Included before a kernel's source, it stands for everything in common.cuh that only a GPU's compiler
// understands; the kernel itself is compiled as it is. Shared memory begins as NaN, a copy lands no earlier
// than it is waited for, and lanes that wait for each other for ever are an error.
#pragma once
#define HOST_LANES
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct Triple { unsigned x, y, z; };
static Triple threadIdx, blockIdx, blockDim, gridDim;
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

#define __restrict__
#define INLINE static inline
#define INLINE_MEMBER inline
#define KERNEL(threads, blocks) extern "C" void
#define DYNAMIC_SHARED(name) unsigned char* name = lanes::shared

namespace lanes {
typedef unsigned u32;
struct Slot { u32 word[8]; };
struct Group { Slot slots[2][32]; u32 arrived = 0, generation = 0; };
struct Copy { void* to; const void* from; u32 bytes; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool over; std::vector<std::vector<Copy>> copies; };

static unsigned char* shared;
static std::vector<Fiber> fibers;
static std::vector<Group> groups;
static std::map<void*, Copy> pending;
static ucontext_t scheduler;
static u32 current, arrived, generation;
static bool moved;
static const char* fault;
static const std::function<void()>* body;

static void yield() { swapcontext(&fibers[current].context, &scheduler); }

// Every lane's words, once all 32 have given theirs.
static const Slot* together(const Slot& mine) {
  Group& group = groups[current / 32];
  const u32 now = group.generation;
  group.slots[now & 1][current % 32] = mine;
  if (++group.arrived == 32) group.arrived = 0, group.generation++, moved = true;
  while (group.generation == now) yield();
  return group.slots[now & 1];
}

static void block_barrier() {
  const u32 now = generation;
  if (++arrived == fibers.size()) arrived = 0, generation++, moved = true;
  while (generation == now) yield();
}

static void enter() {
  (*body)();
  fibers[current].over = moved = true;
  yield();
}

// Runs one block of threads; false where lanes wait for ever.
static bool run_block(const std::function<void()>& kernel) {
  body = &kernel;
  arrived = generation = 0;
  groups.assign((blockDim.x + 31) / 32, Group());
  fibers.resize(blockDim.x);
  pending.clear();
  for (auto& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    fiber.over = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t left = fibers.size(); left;) {
    moved = false;
    left = 0;
    for (current = 0; current < fibers.size(); current++) {
      if (fibers[current].over) continue;
      left++;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
    }
    if (left && !moved) return false;
  }
  return true;
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(typename std::remove_reference<A>::type*)arguments[I]...);
}

// Every block of the grid, one after another; what went wrong, or null.
template <class... A>
static const char* launch(void (*kernel)(A...), const u32* grid, u32 threads, u32 shared_bytes, void** arguments) {
  constexpr u32 MARGIN = 4096;
  std::vector<unsigned char> room(shared_bytes + 128 + MARGIN);
  fault = nullptr;
  blockDim = {threads, 1, 1};
  gridDim = {grid[0], grid[1], 1};
  for (u32 y = 0; y < grid[1]; y++)
    for (u32 x = 0; x < grid[0]; x++) {
      std::fill(room.begin(), room.end(), 0xff);
      shared = room.data() + (128 - (size_t)room.data() % 128);
      blockIdx = {x, y, 0};
      if (!run_block([&] { call(kernel, arguments, std::index_sequence_for<A...>()); }))
        return "lanes wait for each other for ever";
      for (u32 i = 0; i < MARGIN - 128; i++)
        if (shared[shared_bytes + i] != 0xff) return "written past the shared memory asked for";
      if (fault) return fault;
    }
  return nullptr;
}
}  // namespace lanes

static inline void __syncthreads() { lanes::block_barrier(); }
static inline void __syncwarp(unsigned = ~0u) { lanes::together({}); }
static inline unsigned __popc(unsigned value) { return __builtin_popcount(value); }
static inline unsigned __shfl_sync(unsigned, unsigned value, unsigned lane) {
  return lanes::together({{value}})[lane % 32].word[0];
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  lanes::Slot slot = {};
  memcpy(slot.word, &value, sizeof value);
  const lanes::Slot* all = lanes::together(slot);
  memcpy(&value, all[threadIdx.x % 32 ^ mask].word, sizeof value);
  return value;
}
static inline unsigned multiply_add(unsigned a, unsigned b, unsigned c) { return a * b + c; }
static inline unsigned select_bytes(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)high << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  if (selector & 0x8888) lanes::fault = "a selector that spreads signs";
  return out;
}
static inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static inline float fmaf_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#define fmaf fmaf_

static inline unsigned shared_address(const void* pointer) {
  return (unsigned)((const unsigned char*)pointer - lanes::shared);
}
static inline unsigned load_shared(unsigned address) {
  unsigned word;
  memcpy(&word, lanes::shared + address, 4);
  return word;
}
template <class T> static inline T load_once(const T* from) { return *from; }

static inline float wide(unsigned short value) {
#if BF16
  return __uint_as_float((unsigned)value << 16);
#else
  _Float16 half;
  memcpy(&half, &value, 2);
  return (float)half;
#endif
}

static inline unsigned short narrow(float value) {
#if BF16
  const unsigned bits = __float_as_uint(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
  const _Float16 half = (_Float16)value;
  unsigned short out;
  memcpy(&out, &half, 2);
  return out;
#endif
}

static inline float half_of(unsigned word, unsigned upper) { return wide((unsigned short)(word >> 16 * upper)); }

// mma.m16n8k16: with group = lane / 4 and place = lane % 4, register r of a is row group + 8 * (r % 2), columns
// 2 * place + 8 * (r / 2) and the next; register r of b is rows 2 * place + 8 * r and the next, column group.
static inline void multiply(float (&sums)[4], const unsigned* a, unsigned b0, unsigned b1) {
  const lanes::Slot* all = lanes::together({{a[0], a[1], a[2], a[3], b0, b1}});
  const unsigned lane = threadIdx.x % 32;
  for (unsigned j = 0; j < 4; j++) {
    const unsigned row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
    for (unsigned k = 0; k < 16; k++) {
      const unsigned place = k % 8 / 2;
      sums[j] += half_of(all[row % 8 * 4 + place].word[row / 8 + 2 * (k / 8)], k % 2) *
                 half_of(all[column * 4 + place].word[4 + k / 8], k % 2);
    }
  }
}

// mma.sp.m16n8k32: register r of a holds two of columns 4 * place + 16 * (r / 2) and the three after it; register
// r of b is rows 2 * place + 8 * r and the next; the rest as in multiply. The lane of place 2 * HALF says which
// two for columns 0..15, the one after it for 16..31, rows 8 and above in its high half.
template <int HALF>
static inline void multiply_sparse(float (&sums)[4], const uint4& a, const uint4& b, unsigned places) {
  lanes::Slot left[32];
  memcpy(left, lanes::together({{a.x, a.y, a.z, a.w, places}}), sizeof left);
  const lanes::Slot* all = lanes::together({{b.x, b.y, b.z, b.w}});
  const unsigned lane = threadIdx.x % 32;
  for (unsigned j = 0; j < 4; j++) {
    const unsigned row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
    for (unsigned group = 0; group < 8; group++) {
      const unsigned word = left[row % 8 * 4 + group % 4].word[row / 8 + 2 * (group / 4)];
      const unsigned said = left[row % 8 * 4 + HALF * 2 + group / 4].word[4] >> (16 * (row / 8) + 4 * (group % 4));
      const unsigned at[2] = {said & 3, said >> 2 & 3};
      if (at[0] >= at[1]) lanes::fault = "places of kept values do not rise";
      for (unsigned i = 0; i < 2; i++) {
        const unsigned k = group * 4 + at[i];
        sums[j] += half_of(word, i) * half_of(all[column * 4 + k % 8 / 2].word[k / 8], k % 2);
      }
    }
  }
}

static inline unsigned sum_to_here(unsigned value) {
  const lanes::Slot* all = lanes::together({{value}});
  unsigned sum = 0;
  for (unsigned i = 0; i <= threadIdx.x % 32; i++) sum += all[i].word[0];
  return sum;
}

static inline void barrier_begin(unsigned long long* barrier) { *barrier = 0; }
static inline void copy_begin(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
  if (bytes % 16 || (size_t)to % 16 || (size_t)from % 16) lanes::fault = "a copy that is not aligned to 16 bytes";
  if (lanes::pending.count(barrier)) lanes::fault = "a copy begun before the last one of its slot was waited for";
  lanes::pending[barrier] = {to, from, bytes};
}
static inline void barrier_wait(unsigned long long* barrier, unsigned parity) {
  while ((*barrier & 1) == parity) {
    const auto found = lanes::pending.find(barrier);
    if (found == lanes::pending.end()) {
      lanes::yield();
      continue;
    }
    memcpy(found->second.to, found->second.from, found->second.bytes);
    lanes::pending.erase(found);
    ++*barrier;
    lanes::moved = true;
  }
}

static inline void copy_lane(void* to, const void* from) {
  auto& copies = lanes::fibers[threadIdx.x].copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, 16});
}
static inline void copy_commit() {
  auto& copies = lanes::fibers[threadIdx.x].copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}
template <int LEFT>
static inline void copy_wait() {
  auto& copies = lanes::fibers[threadIdx.x].copies;
  while (copies.size() > LEFT + 1) {
    for (const auto& copy : copies.front()) memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
}
