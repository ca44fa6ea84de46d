// What stands in for csrc/cuda/*.cu in a build without CUDA.
#include <stdexcept>

#include "../include/api.h"

namespace ck {
namespace cuda {

void reduce_panel(const Panel&) { throw std::runtime_error("contrastive_kernels: built without CUDA"); }
void weight_panel(const Panel&) { throw std::runtime_error("contrastive_kernels: built without CUDA"); }
int64_t scratch_bytes(int64_t, int64_t) { return 0; }
int version() { return 0; }
const char* architectures() { return ""; }
std::string why_not(int) { return "built without CUDA"; }
bool has_tensor_cores(int) { return false; }

}  // namespace cuda
}  // namespace ck
