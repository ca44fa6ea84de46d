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

// Whether the rows of an operand can be copied in pieces of 16 bytes.
bool in_pieces(const void* operand, int64_t depth, int64_t stride) {
  return reinterpret_cast<uintptr_t>(operand) % 16 == 0 && stride % 8 == 0 && stride >= depth;
}

void check_operands(const Panel& p) {
  check(p.rows == 0 || p.cols == 0 || (p.x && p.y), "panel: scores, or x and y, must not be null");
  check(p.operands != Dtype::kFloat32, "panel: the tensor cores' operands have 16 bits");
  check(p.depth >= 0 && p.depth % 8 == 0, "panel: the depth must be a multiple of 8");
  check(in_pieces(p.x, p.depth, p.x_stride) && in_pieces(p.y, p.depth, p.y_stride),
        "panel: rows of x and y must be aligned to 16 bytes");
}

void check_panel(const Panel& p) {
  check(p.rows >= 0 && p.cols >= 0, "panel: sizes must be non-negative");
  check(p.rows == 0 || p.cols == 0 || p.params, "panel: params must not be null");
  if (p.scores)
    check(p.stride >= p.cols, "panel: stride must be at least cols");
  else
    check_operands(p);
  check(p.pairs.columns_count == 0 || p.pairs.columns, "pairs: columns must not be null when columns_count is not 0");
  check(!p.pairs.row_ids == !p.pairs.col_ids, "pairs: ids of rows need ids of columns");
  check_ceilings(p);
  check(!p.pairs.row_scale && !p.pairs.col_scale, "panel: the GPU's kernels have one scale");
  check(tiles(p.rows) * tiles(p.cols) <= 0x7FFFFFFF, "panel: more tiles than a launch has blocks");
  check(p.scratch || p.scratch_bytes == 0, "panel: scratch must not be null");
  check(reinterpret_cast<uintptr_t>(p.scratch) % sizeof(double) == 0, "panel: scratch must be aligned to 8");
  check(p.scratch_bytes >= scratch_bytes(p.rows, p.cols), "panel: the scratch is too small");
  if (p.term == PairTerm::kExponential)
    check(!p.row.sum == !p.row.shift && !p.col.sum == !p.col.shift, "panel: a sum needs its shift");
  else
    check(p.term == PairTerm::kSigmoid && !p.col.sum && !p.col.gain, "panel: the sigmoid term has no column side");
}

void run(const Panel& p) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(p.device);
  const bool sums = p.row.sum || p.col.sum;
  const bool weights = p.weights != nullptr;
  const bool targets = p.row.target || p.col.target, capped = is_capped(p.pairs);
  const Kind kind = {p.term, p.pairs.row_ids != nullptr, targets, capped};
  const TileKernel tile = p.scores ? panel_pass(kind, sums, weights) : tensor_cores(kind, p.operands, sums, weights);
  launch(p.scores ? "panel_pass_kernel" : "tensor_core_kernel", tile.kernel,
         static_cast<unsigned>(tiles(p.rows) * tiles(p.cols)), kThreads, tile.shared_bytes, p.stream, p);
  launch_merge(p);
}

// What the runtime knows of the code that a device would run.
cudaFuncAttributes attributes(const TileKernel& tile, int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes found = {};
  check_cuda(cudaFuncGetAttributes(&found, tile.kernel), "cudaFuncGetAttributes");
  return found;
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
    for (const Side* side : {&panel.row, &panel.col})
      check(!side->gain == !side->normalizer_shift && !side->gain == !side->normalizer_rest,
            "weight_panel: a gain needs its normalizer");
  check_targets(panel);
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
    attributes(panel_pass({PairTerm::kExponential, false, false}, true, false), device);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool has_tensor_cores(int device) {
  const cudaFuncAttributes found =
      attributes(tensor_cores({PairTerm::kExponential, false, false}, Dtype::kBFloat16, true, false), device);
  return found.ptxVersion >= 80 && found.binaryVersion >= 80;
}

}  // namespace cuda
}  // namespace ck
