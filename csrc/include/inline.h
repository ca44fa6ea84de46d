// How the small functions of the pair terms are inlined, on the host and on the device.
#pragma once

#ifdef __CUDACC__
#define CK_INLINE static __host__ __device__ __forceinline__
#else
#define CK_INLINE static inline __attribute__((always_inline))
#endif
