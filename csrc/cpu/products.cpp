// Products in bfloat16: whether the machine has units for them, the checks and the buffers.
#include <algorithm>
#include <cstring>
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

// Multiplications that are worth a thread: some 3 us of them.
constexpr int64_t kThreadProducts = 1 << 18;

// Where depths of x lie so many bytes apart or more, a cache has few places for their lines, and each block of rows
// would fetch them anew: kGroup blocks are packed together.
constexpr int64_t kFar = 2048, kGroup = 4;

// What the kernel loads at once.
constexpr int64_t kWords = 16;
struct alignas(64) Line {
  uint32_t words[kWords];
};

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t whole_lines(int64_t words) { return ceil_div(words, kWords) * kWords; }

// The grid whose largest part takes least: its multiplications, and packing its rows and columns, of which each number
// takes about as long as kPacking multiplications.
ProductPlan grid_of(const Product& p, int64_t threads) {
  constexpr int64_t kPacking = 4;
  const int64_t col_blocks = ceil_div(p.cols, kProductWidth);
  ProductPlan best;
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

// The entries that lie in x, row by row; in a row, in their order.
class EntriesByRow {
 public:
  explicit EntriesByRow(const Product& p) {
    const Entries& all = p.entries;
    if (!all.values) return;
    const int64_t count = all.turned ? p.depth : p.rows, places = all.turned ? p.rows : p.depth;
    row_start_.reset(new int64_t[p.rows + 2]()), depths_.reset(new int64_t[count]), values_.reset(new float[count]);
    const auto place = [&](int64_t e) { return all.places ? all.places[e] : e + all.offset; };
    const auto lies_in_x = [&](int64_t e) { return place(e) >= 0 && place(e) < places; };
    const auto row = [&](int64_t e) { return all.turned ? place(e) : e; };
    // a counting sort: row_start_[i + 1] is where row i's next entry goes, and in the end where row i + 1 begins
    for (int64_t e = 0; e < count; ++e)
      if (lies_in_x(e)) ++row_start_[row(e) + 2];
    for (int64_t i = 0; i < p.rows; ++i) row_start_[i + 2] += row_start_[i + 1];
    for (int64_t e = 0; e < count; ++e) {
      if (!lies_in_x(e)) continue;
      const int64_t to = row_start_[row(e) + 1]++;
      depths_[to] = all.turned ? e : place(e), values_[to] = all.values[e];
    }
  }

  void add_to(ProductPlan& plan) const {
    plan.row_start = row_start_.get(), plan.depths = depths_.get(), plan.values = values_.get();
  }

 private:
  std::unique_ptr<int64_t[]> row_start_, depths_;
  std::unique_ptr<float[]> values_;
};

// A product of which nothing is empty.
void run(Product p) {
  const int64_t worth = p.rows * p.cols * p.depth / kThreadProducts;
  ProductPlan plan = grid_of(p, std::min<int64_t>(p.threads, std::max<int64_t>(worth, 1)));
  p.threads = static_cast<int>(plan.row_parts * plan.col_parts);
  const int64_t pairs = ceil_div(std::min(p.depth, kProductDepth), 2);
  const int64_t apart = p.x.depth_stride * static_cast<int64_t>(p.x.dtype == Dtype::kFloat32 ? sizeof(float) : 2);
  if (p.x.line_stride == 1 && apart >= kFar) plan.group = kGroup;
  plan.of_rows = whole_lines(plan.group * plan.height * pairs);
  plan.of_thread = plan.of_rows + whole_lines(std::min(plan.cols, kProductCols) * pairs);
  std::unique_ptr<Line[]> packed(new Line[p.threads * plan.of_thread / kWords]);
  plan.packed = packed[0].words;
  std::unique_ptr<float[]> sums;
  if (p.out_dtype != Dtype::kFloat32) {  // of one block, unless several sweeps of the depth add to all of them
    plan.of_sums = (p.depth > kProductDepth ? plan.rows : plan.height) * kProductCols;
    sums.reset(new float[p.threads * plan.of_sums]);
    plan.sums = sums.get();
  }
  const EntriesByRow entries(p);
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
  check(p.out && p.threads >= 1, "multiply_bfloat16: out must not be null, threads at least 1");
  check(p.out_dtype != Dtype::kFloat16 && (!p.add || p.out_dtype == Dtype::kFloat32),
        "multiply_bfloat16: out is float32, or bfloat16 unless it is added to");
  if (p.depth == 0) {
    const int64_t size = p.out_dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    for (int64_t i = 0; !p.add && i < p.rows; ++i)
      std::memset(static_cast<char*>(p.out) + size * i * p.stride, 0, size * p.cols);
    return;
  }
  check_operand(p.x), check_operand(p.y);
  check(!p.entries.values || (p.y.dtype == Dtype::kBFloat16 && p.y.line_stride == 1),
        "multiply_bfloat16: with entries, y must be bfloat16 with line_stride 1");
#ifdef CK_BFLOAT16
  run(p);
#endif
}

}  // namespace ck
