// The C++ side's only interface: plain structs of pointers, sizes and strides. It knows neither torch nor Python;
// all checks of the user's input and all allocations of results happen before it is called.
#pragma once

#include <cstdint>
#include <string>

namespace ck {

enum class PairTerm : int { kExponential = 0, kSigmoid = 1 };
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A vector per row (or column) of the panel. Null pointers: this side is not wanted.
struct Side {
  float* reference = nullptr;         // [n] running maximum, updated in place (exponential)
  float* sum = nullptr;               // [n] running sum, updated in place
  const float* normalizer = nullptr;  // [n] a_i (rows) or b_j (columns)
  const float* gain = nullptr;        // [n] r_i (rows) or c_j (columns); null in a reduce panel
};

// One block of the score matrix. bindings.cpp gives each member its name in Python.
struct Panel {
  PairTerm term = PairTerm::kExponential;
  float* scores = nullptr;  // [rows, cols] dot products <x_i, y_j>; null: the CUDA pass makes them from x and y
  int64_t rows = 0, cols = 0, stride = 0;
  const float* params = nullptr;     // scale, bias
  const int64_t* exclude = nullptr;  // [rows, exclude_count] columns of the whole matrix left out of the stream
  int64_t exclude_count = 0, first_column = 0;
  Side row, col;
  // Where a weight panel writes scale * dL/dz [rows, cols]; it may be `scores` itself. Null in a reduce panel.
  void* weights = nullptr;
  Dtype weights_dtype = Dtype::kFloat32;
  int64_t weights_stride = 0;
  double* dparams = nullptr;  // [2] += sum of w * score, sum of w; null: not wanted
  int threads = 1;            // the CPU's

  // The rest is CUDA's. The operands [rows, depth], [cols, depth], 16-bit, where `scores` is null.
  const void *x = nullptr, *y = nullptr;
  Dtype operands = Dtype::kBFloat16;
  int64_t depth = 0, x_stride = 0, y_stride = 0;
  const float* factor = nullptr;  // [1] what dL/dz leaves times in the weights' place; null: the scale
  int device = 0;
  void* stream = nullptr;   // a cudaStream_t
  void* scratch = nullptr;  // of scratch_bytes, aligned to 8
  int64_t scratch_bytes = 0;
};

enum class SearchTerm : int { kMaximum = 2, kGumbelMax = 3, kRank = 4 };

// One block of the score matrix of which only each row's best column, or two counts, are wanted.
struct SearchPanel {
  SearchTerm term = SearchTerm::kMaximum;
  const float* scores = nullptr;  // [rows, cols] dot products <x_i, y_j>
  int64_t rows = 0, cols = 0, stride = 0;
  const float* params = nullptr;     // scale, bias
  const int64_t* exclude = nullptr;  // [rows, exclude_count] columns of the whole matrix left out of the search
  int64_t exclude_count = 0, first_row = 0, first_column = 0;
  const int64_t *row_ids = nullptr, *col_ids = nullptr;  // [rows], [cols]: pairs of equal ids are left out; or null
  const int64_t* seed = nullptr;                         // [1] of the noise
  float* best = nullptr;                                 // [rows] largest z (with noise) so far, updated in place
  int64_t* best_column = nullptr;                        // [rows] its column of the whole matrix
  const float *low = nullptr, *high = nullptr;           // [rows] bounds
  int64_t *below = nullptr, *above = nullptr;            // [rows] += how many z lie below low, above high
  int threads = 1;
};

// Folds the panel into (best, best_column), the first of equal ones, or into (below, above). NaN is passed over.
void search_panel(const SearchPanel& panel);

// The Gumbel noise of one row's columns first_column ... first_column + n - 1, for tests of its distribution.
void gumbel_array(int64_t seed, int64_t row, int64_t first_column, float* out, int64_t n);

// Folds the panel into row.{reference, sum} and col.{reference, sum}.
void reduce_panel(const Panel& panel);

// Writes the weights; with row.sum or col.sum also folds the panel into them, as reduce_panel does.
void weight_panel(const Panel& panel);

// e^x elementwise with the pair terms' own exponential, for tests of its error.
void exp_array(const float* x, float* out, int64_t n);

// The instruction set that the functions above run with: "avx512", "avx2" or "baseline".
const char* instruction_set();

// Runs with another one ("auto" for the best), for tests and benchmarks. Throws std::invalid_argument where the machine
// lacks it.
void set_instruction_set(const char* name);

// The same two operations on an NVIDIA GPU: every pointer is the device's. They launch on the panel's stream and wait
// for nothing. Without CUDA in the build they throw std::runtime_error.
namespace cuda {

void reduce_panel(const Panel& panel);
void weight_panel(const Panel& panel);

// What a panel's pass needs as scratch.
int64_t scratch_bytes(int64_t rows, int64_t cols);

// The release of CUDA that this was built with (13000 for 13.0), and its architectures ("80_90_90PTX"). 0 and "": none.
int version();
const char* architectures();

// The CUDA runtime's reason why its kernels do not run on this device; "": they do.
std::string why_not(int device);

// Whether the code that a device would run multiplies on tensor cores: such a panel needs no scores.
bool has_tensor_cores(int device);

}  // namespace cuda

}  // namespace ck
