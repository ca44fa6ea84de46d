// The few instructions that C++ has no words for. Tests that run the kernels on a CPU put their own in this file's
// place by defining its guard.
#ifndef CK_PTX_H
#define CK_PTX_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../include/api.h"

namespace ck {
namespace cuda {

// Two floats as bfloat16 or float16 bits, the first one in the lower half; rounded to nearest even.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// No instruction: from here on the compiler knows nothing of a value, and computes anew what depends on it.
__device__ __forceinline__ void forget(float& value) { asm volatile("" : "+f"(value)); }
__device__ __forceinline__ void forget(uint32_t& value) { asm volatile("" : "+r"(value)); }

// From sm_80 on:

// Starts copying 16 bytes into shared memory; with `bytes` 0, writes zeros and reads nothing.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of this thread's copies; waits until all but the latest `PENDING` groups are there.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8, 16 bytes; it gets of each matrix the
// elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&out)[4]) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c += a b, with a [16, 16] and b [16, 8] in 16 bits, summed in float32. Lane l has of c the columns 2 (l % 4) and the
// next, of row l / 4 in `top` and of row l / 4 + 8 in `bottom`.
template <Dtype OPERANDS>
__device__ __forceinline__ void multiply_add(float* top, float* bottom, const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (OPERANDS == Dtype::kBFloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(top[0]), "+f"(top[1]), "+f"(bottom[0]), "+f"(bottom[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(top[0]), "+f"(top[1]), "+f"(bottom[0]), "+f"(bottom[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cuda
}  // namespace ck

#endif
