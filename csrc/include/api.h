// The C++ side's only interface: plain structs of pointers, sizes and strides. It knows neither torch nor Python;
// all checks of the user's input and all allocations of results happen before it is called.
#pragma once

#include <cstdint>
#include <string>

#include "members.h"

namespace ck {

enum class PairTerm : int { kExponential = 0, kSigmoid = 1 };
enum class SearchTerm : int { kMaximum = 2, kGumbelMax = 3, kRank = 4 };
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The diagonal of a matrix that leaves none out.
constexpr int64_t kNoDiagonal = INT64_MIN;

// What pairs of equal ids are, if not what the term makes of them: pairs like others; the only ones that count.
constexpr int kAlikeCount = 1, kAlikeAlone = 2;

#define CK_DECLARE(type, name, initial, comment) type name = initial;
struct Pairs {
  CK_PAIRS_MEMBERS(CK_DECLARE)
};
struct Side {
  CK_SIDE_MEMBERS(CK_DECLARE)
};
struct Panel {
  CK_PANEL_MEMBERS(CK_DECLARE)
  Pairs pairs;
  Side row, col;
};
struct SearchPanel {
  CK_SEARCH_PANEL_MEMBERS(CK_DECLARE)
  Pairs pairs;
};
#undef CK_DECLARE

// A whole matrix of scores with its positives, small enough to stay in a cache.
struct Matrix {
  const float* scores = nullptr;  // [rows, cols] dot products <x_i, y_j>
  float* weights = nullptr;       // [rows, cols] becomes scale * dL/dz; may be the scores; null: not wanted
  bool unscaled = false;          // ... or dL/dz itself
  // [rows] becomes the positives' weights, 0 in a row without one, and their places become 0; null: they lie there
  float* positive_weights = nullptr;
  int64_t rows = 0, cols = 0;
  Pairs pairs;                         // of the whole matrix; the positives are left out beside
  const int64_t* positives = nullptr;  // [rows] the positives' columns, -1 for none; null:
  int64_t offset = kNoDiagonal;        // they lie at row + offset; kNoDiagonal: nowhere
  float scale = 1.0f, bias = 0.0f;
  const float* gain = nullptr;  // [rows] the rows' weights, or null
  double share = 1.0;           // ... and all of them have this one
  double* out = nullptr;        // [3] becomes value, d value / d scale, d value / d bias
  // softmax_matrix alone: [rows] is added to the positives' logits in the losses, and becomes d value / d lift; or null
  const float* lift = nullptr;
  float* dlift = nullptr;
  int threads = 1;
};

// What is given of the rows (or columns) of a weighted sum, and where their states go.
struct GivenSide {
  const float* normalizer = nullptr;  // [2, n] shift, rest; relative ones: [n], what is added to the positive's logit
  const float* gain = nullptr;        // [n], or null for the matrix's share
  float* state = nullptr;  // [2, n] becomes the log-sum as shift, rest; sigmoid: [n] the loss; null: not wanted
};

// sum_i gain_i softplus(n_i - z_i,p(i)), n_i the log-sum over negatives. `both`: and the same over the columns of a
// square. `symmetric`: a set's scores with itself; the weights are those of both ends of a pair. Without `include` the
// denominator has no positive: sum_i gain_i (n_i - z_i,p(i)).
void softmax_matrix(const Matrix& matrix, bool both, bool symmetric, bool include);

// sum_i gain_i (a_i - mean_p z_ip), the supervised contrastive loss: p are the columns of the row's id, whose pairs
// have kAlikeCount, and a_i the log-sum over all that count. share [rows] is 1 over the number of a row's positives, 0
// without; where there is one, it is the row's of `positives`, and left out of the log-sum: gain_i softplus(n_i -
// z_ip).
void label_matrix(const Matrix& matrix, const float* share, bool symmetric);

// exponential: sum_i r_i sum_j exp(z_ij - a_i) over negatives, and the same over columns if they have normalizers;
// `relative`: these are counted from the positive's logit, which then takes part in the gradients.
// sigmoid: sum_i r_i (sum_j softplus(z_ij) over negatives + softplus(-z_i,p(i))).
// dots [rows] becomes the positives' scores, 0 where there is none; or null.
void weighted_matrix(const Matrix& matrix, PairTerm term, const GivenSide& row, const GivenSide& col, bool relative,
                     float* dots);

// Folds the panel into (best, best_column), the first of equal ones, or into (below, above). NaN is passed over.
void search_panel(const SearchPanel& panel);

// The Gumbel noise of one row's columns first_column ... first_column + n - 1, for tests of its distribution.
void gumbel_array(int64_t seed, int64_t row, int64_t first_column, float* out, int64_t n);

// Folds the panel into row.{shift, sum} and col.{shift, sum}.
void reduce_panel(const Panel& panel);

// Writes the weights; with row.sum or col.sum also folds the panel into them, as reduce_panel does.
void weight_panel(const Panel& panel);

// One operand of a product: lines along its depth.
struct Operand {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;  // or kBFloat16
  int64_t line_stride = 0, depth_stride = 0;
};

// A sparse matrix that is added to a product's x and not rounded: one entry in each row or, if `turned`, in each
// column. Those that lie outside of x do not count.
struct Entries {
  const float* values = nullptr;    // [rows], turned [depth]; null: there are none
  const int64_t* places = nullptr;  // entry e lies at [e, places[e]], turned at [places[e], e]; null:
  int64_t offset = 0;               // at e + offset
  bool turned = false;
};

// out[i, j] (+)= sum_k x[i, k] y[j, k], of values that are or become bfloat16, with sums in float32.
struct Product {
  Operand x, y;
  void* out = nullptr;                // [rows, cols]
  Dtype out_dtype = Dtype::kFloat32;  // or kBFloat16
  int64_t rows = 0, cols = 0, depth = 0, stride = 0;
  bool add = false;  // to what is there, in float32
  Entries entries;   // with them, y is bfloat16 and its line_stride 1
  int threads = 1;
};

// On units for bfloat16; throws std::invalid_argument where the machine has none.
void multiply_bfloat16(const Product& product);
bool multiplies_bfloat16();

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

// What the library was compiled from: the package's version, and what stands for all of csrc/.
const char* version();
const char* sources();

}  // namespace ck
