// Products in bfloat16: whether the machine has units for them, the checks and the buffers.
#include <algorithm>
#include <memory>

#include "../include/api.h"
#include "../include/check.h"
#include "isa.h"

namespace ck {
namespace {

// Multiplications that are worth a thread.
constexpr double kThreadProducts = 1 << 18;

// What the kernel loads at once.
struct alignas(64) Line {
  uint32_t words[16];
};

void check_operand(const Operand& operand) {
  check(operand.data, "multiply_bfloat16: operands must not be null");
  check(operand.line_stride == 1 || operand.depth_stride == 1, "multiply_bfloat16: lines or depths are neighbours");
  check(operand.dtype != Dtype::kFloat16, "multiply_bfloat16: operands are float32 or bfloat16");
}

// The entries beside x that lie in it, row by row; in a row, in their order.
class Entries {
 public:
  explicit Entries(const Apart& apart, int64_t rows, int64_t depth) {
    if (!apart.values) return;
    const int64_t count = apart.turned ? depth : rows, places = apart.turned ? rows : depth;
    first_.reset(new int64_t[rows + 2]()), depths_.reset(new int64_t[count]), values_.reset(new float[count]);
    const auto place = [&](int64_t e) { return apart.places ? apart.places[e] : e + apart.offset; };
    const auto lies_in_x = [&](int64_t e) { return place(e) >= 0 && place(e) < places; };
    const auto row = [&](int64_t e) { return apart.turned ? place(e) : e; };
    // counted two places on, added up, and moved on by each entry, a row's number is where its entries begin
    for (int64_t e = 0; e < count; ++e)
      if (lies_in_x(e)) ++first_[row(e) + 2];
    for (int64_t i = 0; i < rows; ++i) first_[i + 2] += first_[i + 1];
    for (int64_t e = 0; e < count; ++e) {
      if (!lies_in_x(e)) continue;
      const int64_t to = first_[row(e) + 1]++;
      depths_[to] = apart.turned ? e : place(e), values_[to] = apart.values[e];
    }
  }

  void add_to(ProductBuffers& buffers) const {
    buffers.first = first_.get(), buffers.depths = depths_.get(), buffers.values = values_.get();
  }

 private:
  std::unique_ptr<int64_t[]> first_, depths_;
  std::unique_ptr<float[]> values_;
};

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
  check(!p.apart.values || (p.y.dtype == Dtype::kBFloat16 && p.y.line_stride == 1),
        "multiply_bfloat16: beside entries apart, y is bfloat16 whose lines are neighbours");
#ifdef CK_BFLOAT16
  // all threads have as many blocks of rows, which are as equal as they can be
  const double worth = static_cast<double>(p.rows) * static_cast<double>(p.cols) * static_cast<double>(p.depth) / kThreadProducts;
  p.threads = static_cast<int>(std::min(static_cast<double>(p.threads), std::max(worth, 1.0)));
  const int64_t of_thread_rows = (p.rows + p.threads - 1) / p.threads;
  const int64_t blocks = (of_thread_rows + kProductRows - 1) / kProductRows;
  const int64_t height = (of_thread_rows + blocks - 1) / blocks, row_blocks = (p.rows + height - 1) / height;
  const int64_t pairs = (std::min(p.depth, kProductDepth) + 1) / 2;
  const int64_t width = std::min((p.cols + kProductWidth - 1) / kProductWidth * kProductWidth, kProductCols);
  p.threads = static_cast<int>(std::min<int64_t>(p.threads, row_blocks));
  const int64_t of_thread = (height * pairs + 15) / 16;
  std::unique_ptr<Line[]> rows(new Line[p.threads * of_thread]), cols(new Line[width * pairs / 16]);
  ProductBuffers buffers = {height, rows[0].words, 16 * of_thread, cols[0].words};
  const Entries entries(p.apart, p.rows, p.depth);
  entries.add_to(buffers);
  avx512bf16::multiply(p, buffers);
#endif
}

}  // namespace ck
