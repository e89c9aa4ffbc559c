// Small protocols, each in a right form and, where `planted` is set, with one defect that the host run must
// catch whatever the order of threads. Two words of output per thread: scenario-dependent, zero where unused.
#include "dispatch/launch.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

using ptx::shared_t;

struct Arguments {
  const uint32_t* in;   // 256 words, read-only
  uint32_t* out;        // 256 words
  uint32_t* counter;    // 4 words, zero at the start
  int planted;
};

// The last block to finish adds up what all have written.
__global__ void hand_over(Arguments p) {
  const int i = threadIdx.x;
  const shared_t flag = ptx::dynamic_shared();
  ptx::store_global(p.out + blockIdx.x * 32 + i, ptx::load_global_constant(p.in + blockIdx.x * 32 + i));
  if (p.planted != 1) ptx::fence();
  ptx::barrier();
  if (i == 0) {
    const uint32_t before = ptx::atomic_inc_wrap(p.counter, gridDim.x - 1);
    if (p.planted != 2) ptx::fence();
    ptx::store_shared(flag, before);
  }
  ptx::barrier();
  if (ptx::load_shared<uint32_t>(flag) != gridDim.x - 1) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += ptx::load_global(p.out + b * 32 + i);
  ptx::store_global(p.out + 128 + i, sum);
}

// Block 0 waits for block 1, which raises a flag.
__global__ void wait_for_block(Arguments p) {
  const int i = threadIdx.x;
  if (blockIdx.x == 1) {
    ptx::store_global(p.out + i, ptx::load_global_constant(p.in + i));
    ptx::barrier();
    if (i == 0 && p.planted != 1) {
      ptx::fence();
      ptx::store_global_volatile(p.counter, 1u);
    }
  } else if (blockIdx.x == 0) {
    if (i == 0) {
      while (ptx::load_global_volatile(p.counter) == 0) {
      }
      if (p.planted != 2) ptx::fence();
    }
    ptx::barrier();
    ptx::store_global(p.out + 128 + i, ptx::load_global(p.out + i) + 1);
  }
}

// Words through shared memory to another lane, or another warp.
__global__ void neighbours(Arguments p) {
  const int i = threadIdx.x;
  const shared_t tile = ptx::dynamic_shared();
  ptx::store_shared(tile + i * 4, ptx::load_global_constant(p.in + i));
  if (p.planted != 1) ptx::sync_warp();
  const uint32_t near = ptx::load_shared<uint32_t>(tile + (i ^ 1) * 4);
  if (p.planted != 2) ptx::barrier();
  const uint32_t far = ptx::load_shared<uint32_t>(tile + (i ^ 32) * 4);
  if (p.planted != 3) ptx::barrier();
  ptx::store_shared(tile + (i ^ 33) * 4, near + far);
  if (p.planted == 4 && i < 32) return;  // ended threads are not waited for, but what they wrote is not ordered
  ptx::barrier();
  ptx::store_global(p.out + i, ptx::load_shared<uint32_t>(tile + i * 4));
}

// One byte of shared memory for each thread: no race, unless two write the same.
__global__ void bytes(Arguments p) {
  const int i = threadIdx.x;
  const shared_t tile = ptx::dynamic_shared();
  ptx::store_shared(tile + (p.planted == 1 ? i / 2 : i), static_cast<uint8_t>(i));
  ptx::barrier();
  ptx::store_global(reinterpret_cast<uint8_t*>(p.out) + (p.planted == 2 ? i / 2 : i),
                    ptx::load_shared<uint8_t>(tile + (p.planted == 1 ? i / 2 : i)));
}

// Copies of one thread, read by another.
__global__ void copies(Arguments p) {
  const int i = threadIdx.x;
  const shared_t tile = ptx::dynamic_shared();
  ptx::store_shared(tile + i * 16, 5u);
  if (p.planted == 1) ptx::load_shared<uint32_t>(tile + (i ^ 1) * 16);
  ptx::cp_async_16(tile + i * 16, p.in + i % 32 * 4);
  ptx::cp_async_commit();
  if (p.planted == 2) ptx::store_shared(tile + i * 16, 7u);
  if (p.planted == 3) ptx::load_shared<uint32_t>(tile + i * 16);
  if (p.planted == 4)
    ptx::cp_async_wait<1>();
  else
    ptx::cp_async_wait<0>();
  if (p.planted != 5) ptx::barrier();
  ptx::store_global(p.out + i, ptx::load_shared<uint32_t>(tile + (i ^ 32) * 16 + 4));
}

// Accesses that no device allows.
__global__ void accesses(Arguments p) {
  const int i = threadIdx.x;
  const shared_t tile = ptx::dynamic_shared();
  ptx::store_shared(tile + i * 4, 1u);
  ptx::barrier();
  uint32_t value = ptx::load_shared<uint32_t>(tile + i * 4);
  if (p.planted == 1) value += ptx::load_shared<uint32_t>(tile + i * 4 + 2);
  if (p.planted == 2) value += ptx::load_shared<uint32_t>(tile + 1280 + i * 4);
  if (p.planted == 3) value += ptx::load_shared<uint32_t>(tile + i * 4 + 256);
  if (p.planted == 4) value += ptx::load_global(p.in + 193 + i);
  if (p.planted == 5) value += ptx::load_global(p.in - 1);
  if (p.planted == 6) ptx::store_global(const_cast<uint32_t*>(p.in) + i, value);
  if (p.planted == 7) value += ptx::load_global(reinterpret_cast<const ptx::Vec<uint32_t, 4>*>(p.in + 1))[0];
  if (p.planted == 8) ptx::cp_async_16(tile + i * 16, p.in + 1 + 4 * (i % 32));
  if (p.planted == 9) ptx::cp_async_16(tile + i * 16, p.in, 17);
  ptx::store_global(p.out + i, value);
  if (p.planted == 10) value += ptx::load_global_constant(p.out + i);
  if (p.planted == 11) ptx::store_global(p.out, value);
  if (p.planted == 12) ptx::atomic_add(p.out, 1u);
}

// Warps that do not come together.
__global__ void divergence(Arguments p) {
  const int i = threadIdx.x, lane = i % 32;
  uint32_t value = static_cast<uint32_t>(i);
  if (p.planted == 1 && lane == 5) return;
  if (p.planted == 2 && lane >= 16)
    value += ptx::ballot(true);
  else
    value += ptx::shuffle_xor(value, 1);
  if (p.planted == 3 && lane == 7) ptx::barrier();
  ptx::sync_warp();
  if (p.planted == 4) ptx::named_barrier(1, 96);
  if (p.planted == 5) ptx::named_barrier(1, 48);
  if (p.planted == 6) ptx::named_barrier(1, i < 32 ? 64 : 96);
  if (p.planted == 7 && (i < 16 || (i >= 32 && i < 48))) ptx::named_barrier(1, 32);
  if (p.planted == 8) ptx::named_barrier(0, 96);
  if (p.planted == 9 && i < 64) ptx::named_barrier(4, 96);
  if (i < 32)
    ptx::named_barrier_arrive(2, 64);
  else if (i < 64)
    ptx::named_barrier(2, 64);
  ptx::barrier();
  ptx::store_global(p.out + i, value);
}

// Two warps produce, two consume, each at its own pace: twice over, through two stages of shared memory.
__global__ void pipeline(Arguments p) {
  const int i = threadIdx.x % 64;
  const shared_t tile = ptx::dynamic_shared();
  for (int step = 0; step < 4; ++step) {
    const int stage = step % 2;
    const shared_t mine = tile + stage * 256 + i * 4;
    if (threadIdx.x < 64) {
      if (step >= 2) ptx::named_barrier(3 + stage, 128);  // the stage is free
      ptx::store_shared(mine, ptx::load_global_constant(p.in + step * 64 + i));
      if (p.planted != 1 || step != 3) ptx::named_barrier_arrive(1 + stage, 128);  // the stage is full
    } else {
      if (p.planted != 2 || step != 3) ptx::named_barrier(1 + stage, 128);
      ptx::store_global(p.out + step * 64 + i, ptx::load_shared<uint32_t>(mine));
      if (step < 2) ptx::named_barrier_arrive(3 + stage, 128);
    }
  }
}

// The source of a copy changes while it is under way, before any thread waits.
__global__ void source(Arguments p) {
  const int i = threadIdx.x;
  const shared_t tile = ptx::dynamic_shared();
  ptx::store_global(p.out + i, 3u);
  ptx::cp_async_4(tile + i * 4, p.out + i);
  ptx::cp_async_commit();
  if (p.planted != 2) ptx::cp_async_wait<0>();
  if (p.planted != 1) ptx::barrier();
  ptx::store_global(p.out + (i ^ 1), 4u);
  if (p.planted == 2) ptx::cp_async_wait<0>();
  ptx::store_global(p.out + 64 + i, ptx::load_shared<uint32_t>(tile + i * 4));
}

// Atomics that do not race: what they find depends on who comes first.
__global__ void first_come(Arguments p) {
  const uint32_t before = ptx::atomic_add(p.counter, 1u);
  ptx::store_global(p.out + threadIdx.x, p.planted ? before : 1u);
}

__global__ void metadata(Arguments p) {
  uint32_t a[4] = {}, b[4] = {};
  float d[4] = {};
  ptx::mma_sp_m16n8k32_f16<0>(d, a, b, p.planted ? 0x44444440u : 0x44444444u);
  ptx::store_global(p.out + threadIdx.x, ptx::float_to_bits(d[0]));
}

}  // namespace
}  // namespace tersor

#define SCENARIO(name, grid, threads, start)                                                                         \
  extern "C" int scenario_##name(const uint32_t* in, uint32_t* out, uint32_t* counter, int planted) {                \
    return tersor::start(tersor::name, dim3(grid), dim3(threads), 1024 + 256, nullptr,                               \
                         tersor::Arguments{in, out, counter, planted});                                              \
  }
SCENARIO(hand_over, 4, 32, launch)
SCENARIO(wait_for_block, 3, 32, launch_resident)
SCENARIO(neighbours, 1, 64, launch)
SCENARIO(bytes, 1, 64, launch)
SCENARIO(copies, 1, 64, launch)
SCENARIO(accesses, 1, 64, launch)
SCENARIO(divergence, 1, 96, launch)
SCENARIO(pipeline, 1, 128, launch)
SCENARIO(source, 1, 64, launch)
SCENARIO(first_come, 1, 64, launch)
SCENARIO(metadata, 1, 64, launch)

// A launch of any shape.
extern "C" int scenario_shape(const uint32_t* in, uint32_t* out, uint32_t* counter, int threads, int shared_bytes) {
  return tersor::launch(tersor::metadata, dim3(1), dim3(threads), shared_bytes, nullptr,
                        tersor::Arguments{in, out, counter, 0});
}

// The same wait without the promise that all blocks run at once.
extern "C" int scenario_not_resident(const uint32_t* in, uint32_t* out, uint32_t* counter, int) {
  return tersor::launch(tersor::wait_for_block, dim3(3), dim3(32), 128, nullptr,
                        tersor::Arguments{in, out, counter, 0});
}
