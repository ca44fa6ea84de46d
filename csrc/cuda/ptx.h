// The few instructions that C++ has no words for. Tests that run the kernels on a CPU put their own in this file's
// place by defining its guard.
#ifndef CK_PTX_H
#define CK_PTX_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

}  // namespace cuda
}  // namespace ck

#endif
