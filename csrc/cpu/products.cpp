// Products in bfloat16: whether the machine has units for them, the checks and the buffers.
#include <algorithm>
#include <memory>

#include "../include/api.h"
#include "../include/check.h"
#include "isa.h"

namespace ck {
namespace {

void check_operand(const Operand& operand) {
  check(operand.data, "multiply_bfloat16: operands must not be null");
  check(operand.line_stride == 1 || operand.depth_stride == 1, "multiply_bfloat16: lines or depths are neighbours");
  check(operand.dtype != Dtype::kFloat16, "multiply_bfloat16: operands are float32 or bfloat16");
}

#ifdef CK_BFLOAT16

// Multiplications that are worth a thread.
constexpr double kThreadProducts = 1 << 18;

// What the kernel loads at once.
constexpr int64_t kWords = 16;
struct alignas(64) Line {
  uint32_t words[kWords];
};

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t whole_lines(int64_t words) { return ceil_div(words, kWords) * kWords; }

// The grid whose largest part takes least: its multiplications, and packing its rows and columns, of which each number
// takes as long as kPacking multiplications.
ProductPlan plan_of(const Product& p, int64_t threads) {
  constexpr int64_t kPacking = 4;
  const int64_t col_blocks = ceil_div(p.cols, kProductWidth);
  ProductPlan best = {};
  int64_t least = 0;
  for (int64_t across = 1; across <= std::min(threads, col_blocks); ++across) {
    const int64_t rows = ceil_div(p.rows, std::min(threads / across, p.rows));
    const int64_t cols = ceil_div(col_blocks, across) * kProductWidth;
    const int64_t blocks = ceil_div(rows, kProductRows), height = ceil_div(rows, blocks);
    const int64_t cost = blocks * height * cols + kPacking * (rows + cols);
    if (least && cost >= least) continue;
    least = cost;
    best.rows = rows, best.cols = cols, best.height = height;
  }
  best.row_parts = ceil_div(p.rows, best.rows), best.col_parts = ceil_div(p.cols, best.cols);
  return best;
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

  void add_to(ProductPlan& plan) const {
    plan.first = first_.get(), plan.depths = depths_.get(), plan.values = values_.get();
  }

 private:
  std::unique_ptr<int64_t[]> first_, depths_;
  std::unique_ptr<float[]> values_;
};

// A product of which nothing is empty.
void run(Product p) {
  const double work = static_cast<double>(p.rows) * static_cast<double>(p.cols) * static_cast<double>(p.depth);
  const double threads = std::min(static_cast<double>(p.threads), std::max(work / kThreadProducts, 1.0));
  ProductPlan plan = plan_of(p, static_cast<int64_t>(threads));
  p.threads = static_cast<int>(plan.row_parts * plan.col_parts);
  const int64_t pairs = ceil_div(std::min(p.depth, kProductDepth), 2);
  plan.of_rows = whole_lines(plan.height * pairs);
  plan.of_thread = plan.of_rows + whole_lines(std::min(plan.cols, kProductCols) * pairs);
  std::unique_ptr<float[]> sums;
  if (p.rounded && p.depth > kProductDepth) {  // several sweeps add to them
    sums.reset(new float[p.rows * p.stride]);
    p.out = sums.get();
  } else if (p.rounded) {
    plan.sums = plan.of_thread;
    plan.of_thread += whole_lines(plan.height * kProductCols);
  }
  std::unique_ptr<Line[]> packed(new Line[p.threads * plan.of_thread / kWords]);
  plan.packed = packed[0].words;
  const Entries entries(p.apart, p.rows, p.depth);
  entries.add_to(plan);
  avx512bf16::multiply(p, plan);
}

#endif

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

void multiply_bfloat16(const Product& p) {
  check(multiplies_bfloat16(), "multiply_bfloat16: this machine has no units for it");
  check(p.rows >= 0 && p.depth >= 0 && p.cols >= 0 && p.stride >= p.cols, "multiply_bfloat16: sizes are ordered");
  if (p.rows == 0 || p.cols == 0) return;
  check(!p.out != !p.rounded && p.threads >= 1, "multiply_bfloat16: one result must not be null, threads at least 1");
  check(!p.add || p.out, "multiply_bfloat16: it adds in float32");
  if (p.depth == 0) {
    for (int64_t i = 0; !p.add && i < p.rows; ++i) {
      if (p.out) std::fill_n(p.out + i * p.stride, p.cols, 0.0f);
      if (p.rounded) std::fill_n(p.rounded + i * p.stride, p.cols, uint16_t{0});
    }
    return;
  }
  check_operand(p.x), check_operand(p.y);
  check(!p.apart.values || (p.y.dtype == Dtype::kBFloat16 && p.y.line_stride == 1),
        "multiply_bfloat16: beside entries apart, y is bfloat16 whose lines are neighbours");
#ifdef CK_BFLOAT16
  run(p);
#endif
}

}  // namespace ck
