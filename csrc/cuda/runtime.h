// The host's side of the CUDA runtime: errors become exceptions, the current device is put back.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ck {
namespace cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // this error is reported here, not by the next call
  throw std::runtime_error(std::string("contrastive_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current and puts back the one before, also where something throws.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// Launches a kernel of one parameter.
template <typename T>
void launch(const char* name, void (*kernel)(T), unsigned blocks, unsigned threads, size_t shared_bytes, void* stream,
            const T& argument) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, argument), name);
}

}  // namespace cuda
}  // namespace ck
