// CUDA on a CPU, as far as csrc/cuda uses it: blocks run one after the other, a block's threads take turns as fibers
// and meet at barriers, shuffles and matrix instructions. The kernels' own sources run through it unchanged, so that
// their arithmetic, their indices and their synchronisation are tested where there is no GPU. It stands in for the
// toolkit's header of this name.
//
// What a GPU would leave to chance is made visible: shared memory starts as NaN, and the order in which threads and
// blocks run can be reversed or shuffled (emulator_set_order), which must not show in any result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define CUDART_VERSION 99000
#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx;

// ---- what a block's threads do together ----

namespace emulator {

constexpr unsigned kLanes = 32;

// Waits for the block's other threads, or for the warp's.
void block_barrier();
void warp_barrier();

// Each lane's part of an exchange within a warp: 64 bytes in, everybody's out. Returns the warp's [32][64].
using Slot = unsigned char[64];
const Slot* exchange(const void* mine, size_t bytes);

// Copies that are on their way until their group is waited for, thread by thread.
void copy_async(void* to, const void* from, int bytes);
void end_copies();
void wait_for_copies(size_t pending);

void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

// An error to return from the next launch, 0 for none.
int take_failure();

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  const emulator::Slot* all = emulator::exchange(&value, sizeof value);
  std::memcpy(&value, all[(threadIdx.x % emulator::kLanes) ^ static_cast<unsigned>(lanes)], sizeof value);
  return value;
}

// ---- the host's side ----

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
using cudaStream_t = void*;
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, T*) {
  *found = {90, 90};
  return emulator::take_failure();
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (const cudaError_t error = emulator::take_failure()) return error;
  const std::tuple<Parameters...> copies(arguments...);
  emulator::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}

// ---- in the place of csrc/cuda/ptx.h ----

#define CK_PTX_H

#include "../../csrc/include/api.h"

namespace ck {
namespace cuda {

namespace emulated {
#define CK_INLINE static inline
#include "../../csrc/include/dtype.h"
#undef CK_INLINE
}  // namespace emulated

template <typename T>
void forget(T&) {}

inline void copy_async(void* to, const void* from, int bytes) { emulator::copy_async(to, from, bytes); }
inline void end_copies() { emulator::end_copies(); }
template <int PENDING>
void wait_for_copies() {
  emulator::wait_for_copies(PENDING);
}

inline void load_matrices(const void* row, uint32_t (&out)[4]) {
  const emulator::Slot* all = emulator::exchange(&row, sizeof row);
  const unsigned lane = threadIdx.x % emulator::kLanes;
  for (unsigned m = 0; m < 4; ++m) {
    const unsigned char* from;
    std::memcpy(&from, all[m * 8 + lane / 4], sizeof from);
    std::memcpy(&out[m], from + lane % 4 * 4, sizeof out[m]);
  }
}

template <Dtype OPERANDS>
float widen(uint32_t pair, unsigned half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  if (OPERANDS == Dtype::kBFloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

// mma.sync.m16n8k16, with the fragments' places as the PTX manual has them.
template <Dtype OPERANDS>
void multiply_add(float* top, float* bottom, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulator::Slot* all = emulator::exchange(mine, sizeof mine);
  const unsigned lane = threadIdx.x % emulator::kLanes, row = lane / 4;
  for (unsigned k = 0; k < 16; ++k) {
    uint32_t left[6], right[6];
    std::memcpy(left, all[row * 4 + k % 8 / 2], sizeof left);
    const uint32_t upper = left[k / 8 * 2], lower = left[k / 8 * 2 + 1];
    for (unsigned c = 0; c < 2; ++c) {
      std::memcpy(right, all[(lane % 4 * 2 + c) * 4 + k % 8 / 2], sizeof right);
      const float factor = widen<OPERANDS>(right[4 + k / 8], k % 2);
      top[c] += widen<OPERANDS>(upper, k % 2) * factor;
      bottom[c] += widen<OPERANDS>(lower, k % 2) * factor;
    }
  }
}

inline uint32_t pack_bfloat16(float low, float high) {
  return emulated::to_bfloat16(low) | static_cast<uint32_t>(emulated::to_bfloat16(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}

}  // namespace cuda
}  // namespace ck
