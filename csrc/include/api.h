// The C++ side's only interface: plain structs of pointers, sizes and strides. It knows neither torch nor Python;
// all checks of the user's input and all allocations of results happen before it is called.
#pragma once

#include <cstdint>

namespace ck {

enum class PairTerm : int { kExponential = 0, kSigmoid = 1 };
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

// A vector per row (or column) of the panel. Null pointers: this side is not wanted.
struct Side {
  float* reference = nullptr;         // [n] running maximum, updated in place (exponential)
  float* sum = nullptr;               // [n] running sum, updated in place
  const float* normalizer = nullptr;  // [n] a_i (rows) or b_j (columns)
  const float* gain = nullptr;        // [n] r_i (rows) or c_j (columns); null in a reduce panel
};

// One block of the score matrix.
struct Panel {
  PairTerm term = PairTerm::kExponential;
  float* scores = nullptr;  // [rows, cols] dot products <x_i, y_j>
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
  int threads = 1;
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

}  // namespace ck
