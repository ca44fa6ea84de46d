// Picks the instruction set at run time and checks the calls.
#include <algorithm>
#include <cstring>
#include <memory>

#include "../include/api.h"
#include "../include/check.h"
#include "isa.h"

namespace ck {
namespace {

bool machine_has(const IsaTable& isa) {
#ifdef CK_X86
  __builtin_cpu_init();
  if (&isa == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&isa == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &isa == &kBaseline;
}

const IsaTable* find(const char* name) {
  const IsaTable* const all[] = {
#ifdef CK_X86
      &kAvx512, &kAvx2,
#endif
      &kBaseline};
  for (const IsaTable* isa : all)
    if ((std::strcmp(name, "auto") == 0 || std::strcmp(name, isa->name) == 0) && machine_has(*isa)) return isa;
  return nullptr;
}

const IsaTable*& chosen() {
  static const IsaTable* isa = find("auto");
  return isa;
}

void check_pairs(const Pairs& pairs) {
  check(pairs.columns_count == 0 || pairs.columns, "pairs: columns must not be null when columns_count is not 0");
  check(!pairs.row_ids == !pairs.col_ids, "pairs: ids of rows need ids of columns");
}

void check_panel(const Panel& p) {
  check(p.rows >= 0 && p.cols >= 0 && p.stride >= p.cols, "panel: sizes and stride must be non-negative and ordered");
  check(p.rows == 0 || p.cols == 0 || (p.scores && p.params), "panel: scores and params must not be null");
  check_pairs(p.pairs);
  check(p.weights_dtype != Dtype::kFloat16, "panel: the CPU has no float16 weights");
  check_ceilings(p);
  check_scales(p);
  check(p.threads >= 1, "panel: threads must be at least 1");
  if (p.term == PairTerm::kExponential)
    check(!p.row.sum == !p.row.shift && !p.col.sum == !p.col.shift, "panel: a sum needs its shift");
  else
    check(!p.col.sum && !p.col.gain, "panel: the sigmoid term has no column side");
}

void check_search(const SearchPanel& p) {
  check(p.rows >= 0 && p.cols >= 0 && p.stride >= p.cols, "search: sizes and stride must be non-negative and ordered");
  check(p.rows == 0 || p.cols == 0 || (p.scores && p.params), "search: scores and params must not be null");
  check_pairs(p.pairs);
  check(!p.pairs.row_scale && !p.pairs.col_scale, "search: no scales by row");
  check(p.threads >= 1, "search: threads must be at least 1");
  if (p.term == SearchTerm::kRank)
    check(p.low && p.high && p.below && p.above, "search: a rank needs bounds and counts");
  else
    check(p.best && p.best_column, "search: a maximum needs its score and its column");
  check(p.term != SearchTerm::kGumbelMax || p.seed, "search: noise needs its seed");
  const int64_t last_row = p.pairs.first_row + p.rows, last_column = p.pairs.first_column + p.cols;
  check(p.pairs.first_row >= 0 && last_row <= (int64_t{1} << 32), "search: rows must be 32-bit numbers");
  check(p.pairs.first_column >= 0 && last_column <= (int64_t{1} << 34), "search: columns must be 34-bit numbers");
}

// Runs the pass with buffers of its own; memory that cannot be had is an exception, before any thread starts.
void run(const Panel& p) {
  const int64_t stripes = (p.rows + kStripe - 1) / kStripe;
  const bool columns = p.term == PairTerm::kExponential && p.col.sum;
  Panel panel = p;
  panel.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(p.threads, stripes)));
  std::unique_ptr<Scratch[]> scratch(new Scratch[panel.threads]);
  std::unique_ptr<ParamSums[]> params(new ParamSums[stripes]);
  std::unique_ptr<float[]> partials(columns ? new float[2 * stripes * p.cols] : nullptr);
  std::unique_ptr<float[]> moments(p.col.dscale ? new float[stripes * p.cols] : nullptr);
  float* const sums = columns ? partials.get() + stripes * p.cols : nullptr;
  Buffers buffers = {scratch.get(), params.get(), partials.get(), sums};
  buffers.col_moment = moments.get();
  p.pairs.row_scale ? chosen()->run_scaled(panel, buffers) : chosen()->run_panel(panel, buffers);
}

}  // namespace

const IsaTable& chosen_isa() { return *chosen(); }

void reduce_panel(const Panel& panel) {
  check_panel(panel);
  check(!panel.weights, "reduce_panel: weights must be null");
  check(panel.row.sum || panel.col.sum, "reduce_panel: at least one side must be wanted");
  run(panel);
}

void weight_panel(const Panel& panel) {
  check_panel(panel);
  check(panel.weights && panel.weights_stride >= panel.cols, "weight_panel: weights must not be null");
  check(panel.row.gain || panel.col.gain, "weight_panel: at least one side must have a gain");
  if (panel.term == PairTerm::kExponential)
    for (const Side* side : {&panel.row, &panel.col})
      check(!side->gain == !side->normalizer_shift && !side->gain == !side->normalizer_rest,
            "weight_panel: a gain needs its normalizer");
  check_targets(panel);
  run(panel);
}

void search_panel(const SearchPanel& panel) {
  check_search(panel);
  SearchPanel p = panel;
  p.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(p.threads, p.rows)));
  std::unique_ptr<SearchScratch[]> scratch(new SearchScratch[p.threads]);
  chosen()->run_search(p, scratch.get());
}

void gumbel_array(int64_t seed, int64_t row, int64_t first_column, float* out, int64_t n) {
  chosen()->gumbel_run(seed, row, first_column, out, n);
}

void exp_array(const float* x, float* out, int64_t n) { chosen()->exp_run(x, out, n); }

const char* instruction_set() { return chosen()->name; }

void set_instruction_set(const char* name) {
  const IsaTable* isa = find(name);
  check(isa != nullptr, "set_instruction_set: expected auto, avx512, avx2 or baseline, and one this machine has");
  chosen() = isa;
}

}  // namespace ck
