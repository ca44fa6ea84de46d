// The emulator's scheduler: a block's threads as fibers of one thread of the CPU.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx;

namespace ck {
namespace cuda {
constexpr size_t kSharedBytes = 48 * 1024;  // what every GPU has without asking for more
__attribute__((aligned(128))) unsigned char shared_memory[kSharedBytes];
}  // namespace cuda
}  // namespace ck

namespace emulator {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool started = false, finished = false;
  unsigned exchanges = 0;
  std::vector<Copy> open;                 // copies of the group that is not ended
  std::vector<std::vector<Copy>> groups;  // that nobody has waited for
};

// Threads that wait for each other: the last to come lets all go on.
struct Barrier {
  unsigned arrived = 0, generation = 0, members = 0;
};

std::vector<Fiber> fibers(kMostThreads);
Barrier block;
Barrier warps[kMostThreads / kLanes];
Slot slots[kMostThreads / kLanes][2][kLanes];
const std::function<void()>* thread_body;
jmp_buf scheduler_place;
int order = 0, failure = 0, device = 0, launches = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

void switch_to_scheduler() {
  if (_setjmp(fibers[threadIdx.x].place) == 0) _longjmp(scheduler_place, 1);
}

void leave(Barrier& barrier) {  // a thread that is done no longer takes part
  --barrier.members;
  if (barrier.members > 0 && barrier.arrived == barrier.members) barrier.arrived = 0, ++barrier.generation;
}

void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) switch_to_scheduler();
}

void fiber_main() {
  (*thread_body)();
  Fiber& mine = fibers[threadIdx.x];
  if (!mine.open.empty() || !mine.groups.empty()) fail("a thread ended with copies on their way");
  mine.finished = true;
  leave(block);
  leave(warps[threadIdx.x / kLanes]);
  _longjmp(scheduler_place, 1);
}

void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(scheduler_place) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

std::vector<unsigned> turns(unsigned n, unsigned seed) {
  std::vector<unsigned> all(n);
  for (unsigned k = 0; k < n; ++k) all[k] = order == 1 ? n - 1 - k : k;
  if (order > 1) std::shuffle(all.begin(), all.end(), std::mt19937(static_cast<unsigned>(order) * 7919u + seed));
  return all;
}

void run_block(unsigned threads, unsigned seed) {
  block = {0, 0, threads};
  for (unsigned w = 0; w * kLanes < threads; ++w) warps[w] = {0, 0, std::min(kLanes, threads - w * kLanes)};
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].started = fibers[t].finished = false;
    fibers[t].exchanges = 0;
  }
  const std::vector<unsigned> all = turns(threads, seed);
  for (unsigned left = threads; left > 0;) {
    left = 0;
    for (const unsigned t : all)
      if (!fibers[t].finished) {
        resume(t);
        left += !fibers[t].finished;
      }
  }
}

}  // namespace

void block_barrier() { wait(block); }
void warp_barrier() { wait(warps[threadIdx.x / kLanes]); }

const Slot* exchange(const void* mine, size_t bytes) {
  const unsigned warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  // two sets of slots in turn: nobody is two exchanges ahead of anybody
  const unsigned turn = fibers[threadIdx.x].exchanges++ % 2;
  std::memcpy(slots[warp][turn][lane], mine, bytes);
  warp_barrier();
  return slots[warp][turn];
}

void copy_async(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) fail("a copy is not aligned");
  fibers[threadIdx.x].open.push_back({to, from, bytes});
}

void end_copies() {
  Fiber& mine = fibers[threadIdx.x];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_for_copies(size_t pending) {
  std::vector<std::vector<Copy>>& groups = fibers[threadIdx.x].groups;
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  constexpr unsigned char kNan = 0xFF, kUntouched = 0xA5;
  unsigned char* const memory = ck::cuda::shared_memory;
  if (threads > kMostThreads || shared_bytes > ck::cuda::kSharedBytes)
    fail("too many threads, or too much shared memory");
  ++launches;
  thread_body = &thread;
  for (const unsigned b : turns(blocks, 0)) {
    blockIdx = dim3(b, 0, 0);
    std::memset(memory, kNan, shared_bytes);
    std::memset(memory + shared_bytes, kUntouched, ck::cuda::kSharedBytes - shared_bytes);
    run_block(threads, b);
    for (size_t k = shared_bytes; k < ck::cuda::kSharedBytes; ++k)
      if (memory[k] != kUntouched) fail("shared memory is written beyond what was asked for");
  }
}

int take_failure() {
  const int taken = failure;
  failure = 0;
  return taken;
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return 101;
  emulator::device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == 101 ? "invalid device ordinal" : "emulated failure";
}

// ---- for the tests, by ctypes ----

extern "C" {
__attribute__((visibility("default"))) void emulator_set_order(int order) { emulator::order = order; }
__attribute__((visibility("default"))) void emulator_fail_next(int error) { emulator::failure = error; }
__attribute__((visibility("default"))) int emulator_device() { return emulator::device; }
__attribute__((visibility("default"))) int emulator_launches() { return emulator::launches; }
}
