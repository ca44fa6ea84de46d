// Products in bfloat16: whether the machine has units for them, the checks and the buffers.
#include <algorithm>
#include <memory>

#include "../include/api.h"
#include "../include/check.h"
#include "isa.h"

namespace ck {
namespace {

// What the kernel loads at once.
struct alignas(64) Line {
  uint32_t words[16];
};

void check_operand(const Operand& operand) {
  check(operand.data, "multiply_bfloat16: operands must not be null");
  check(operand.line_stride == 1 || operand.depth_stride == 1, "multiply_bfloat16: lines or depths are neighbours");
  check(operand.dtype != Dtype::kFloat16, "multiply_bfloat16: operands are float32 or bfloat16");
}

}  // namespace

bool multiplies_bfloat16() {
#ifdef CK_BFLOAT16
  __builtin_cpu_init();
  static const bool here = __builtin_cpu_supports("avx512bf16");
  return here && &chosen_isa() == &kAvx512;
#else
  return false;
#endif
}

void multiply_bfloat16(const Product& product) {
  check(multiplies_bfloat16(), "multiply_bfloat16: this machine has no units for it");
  Product p = product;
  check(p.rows >= 0 && p.depth >= 0 && p.cols >= 0 && p.stride >= p.cols, "multiply_bfloat16: sizes are ordered");
  if (p.rows == 0 || p.cols == 0) return;
  check(p.out && p.threads >= 1, "multiply_bfloat16: out must not be null, threads at least 1");
  if (p.depth == 0) {
    for (int64_t i = 0; !p.add && i < p.rows; ++i) std::fill_n(p.out + i * p.stride, p.cols, 0.0f);
    return;
  }
  check_operand(p.x), check_operand(p.y);
#ifdef CK_BFLOAT16
  const int64_t row_blocks = (p.rows + kProductRows - 1) / kProductRows;
  const int64_t pairs = (std::min(p.depth, kProductDepth) + 1) / 2;
  const int64_t width = std::min((p.cols + kProductWidth - 1) / kProductWidth * kProductWidth, kProductCols);
  p.threads = static_cast<int>(std::min<int64_t>(p.threads, row_blocks));
  const int64_t of_thread = (kProductRows * pairs + 15) / 16;
  std::unique_ptr<Line[]> rows(new Line[p.threads * of_thread]), cols(new Line[width * pairs / 16]);
  avx512bf16::multiply(p, {rows[0].words, 16 * of_thread, cols[0].words});
#endif
}

}  // namespace ck
