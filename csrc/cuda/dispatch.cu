// Checks a panel, chooses its kernel and launches it.
#include "../include/api.h"
#include "../include/check.h"
#include "epilogue.h"
#include "kernels.h"
#include "runtime.h"

#ifndef CK_CUDA_ARCHITECTURES  // as in 80_90_90PTX
#define CK_CUDA_ARCHITECTURES
#endif
#define CK_TEXT_OF(x) #x
#define CK_TEXT(x) CK_TEXT_OF(x)

namespace ck {
namespace cuda {
namespace {

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

void check_panel(const Panel& p) {
  check(p.rows >= 0 && p.cols >= 0 && p.stride >= p.cols, "panel: sizes and stride must be non-negative and ordered");
  check(p.rows == 0 || p.cols == 0 || (p.scores && p.params), "panel: scores and params must not be null");
  check(p.exclude_count == 0 || p.exclude, "panel: exclude must not be null when exclude_count is not 0");
  check(tiles(p.rows) * tiles(p.cols) <= 0x7FFFFFFF, "panel: more tiles than a launch has blocks");
  check(p.scratch || p.scratch_bytes == 0, "panel: scratch must not be null");
  check(reinterpret_cast<uintptr_t>(p.scratch) % sizeof(double) == 0, "panel: scratch must be aligned to 8");
  check(p.scratch_bytes >= scratch_bytes(p.rows, p.cols), "panel: the scratch is too small");
  if (p.term == PairTerm::kExponential)
    check(!p.row.sum == !p.row.reference && !p.col.sum == !p.col.reference, "panel: a sum needs its reference");
  else
    check(p.term == PairTerm::kSigmoid && !p.col.sum && !p.col.gain, "panel: the sigmoid term has no column side");
}

void run(const Panel& p) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(p.device);
  const bool sums = p.row.sum || p.col.sum;
  const TileKernel tile = panel_pass(p.term == PairTerm::kExponential, sums, p.weights != nullptr);
  launch("panel_pass_kernel", tile.kernel, static_cast<unsigned>(tiles(p.rows) * tiles(p.cols)), kThreads,
         tile.shared_bytes, p.stream, p);
  launch_merge(p);
}

}  // namespace

void reduce_panel(const Panel& panel) {
  check_panel(panel);
  check(!panel.weights && !panel.dparams, "reduce_panel: weights and dparams must be null");
  check(panel.row.sum || panel.col.sum, "reduce_panel: at least one side must be wanted");
  run(panel);
}

void weight_panel(const Panel& panel) {
  check_panel(panel);
  check(panel.weights && panel.weights_stride >= panel.cols, "weight_panel: weights must not be null");
  check(panel.row.gain || panel.col.gain, "weight_panel: at least one side must have a gain");
  if (panel.term == PairTerm::kExponential)
    check(!panel.row.gain == !panel.row.normalizer && !panel.col.gain == !panel.col.normalizer,
          "weight_panel: a gain needs its normalizer");
  run(panel);
}

int64_t scratch_bytes(int64_t rows, int64_t cols) {
  const int64_t down = tiles(rows), across = tiles(cols);
  return 2 * down * across * static_cast<int64_t>(sizeof(double)) +
         2 * (across * rows + down * cols) * static_cast<int64_t>(sizeof(float));
}

int version() { return CUDART_VERSION; }
const char* architectures() { return CK_TEXT(CK_CUDA_ARCHITECTURES); }

std::string why_not(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, panel_pass(true, true, false).kernel), "cudaFuncGetAttributes");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace cuda
}  // namespace ck
