// What each instruction set's source file offers to the dispatcher, and the buffers that the dispatcher gives it: those
// files allocate nothing and use no template of the standard library, whose single copy the linker might take from a
// file that the machine cannot execute.
#pragma once

#include "../include/api.h"

namespace ck {

// Rows of a stripe, the unit of work of a thread, and columns of a chunk of it: 256 KiB of scores, which stay in a
// core's cache from the first sweep to the second, in rows long enough for the prefetcher.
constexpr int64_t kStripe = 32;
constexpr int64_t kChunk = 2048;

// Where a row's logits come from: z[j] = source[j] * scale + bias.
struct RowSource {
  const float* source;
  float scale, bias;
};

// One thread's buffers.
struct alignas(64) Scratch {
  float z[kStripe * kChunk];  // rows with excluded pairs
  float row_shift[kStripe], row_sum[kStripe], row_gain[kStripe], row_moment[kStripe];
  float col_shift[kChunk], col_sum[kChunk], col_gain[kChunk], col_moment[kChunk];
  float col_ceiling[kChunk], col_threshold[kChunk];
  RowSource rows[kStripe];
};

// One stripe's part of the gradients of scale and bias.
struct ParamSums {
  double dscale = 0.0, dbias = 0.0;
};

struct Buffers {
  Scratch* scratch;            // [threads]
  ParamSums* params;           // [stripes]
  float *col_shift, *col_sum;  // [stripes, cols], or null
  // What the first visit to a whole matrix keeps for the second.
  float *row_shift = nullptr, *row_sum = nullptr, *row_moment = nullptr;  // [rows]
  float* col_moment = nullptr;  // [stripes, cols], which weights with scales by column keep too
  bool* kept = nullptr;         // [stripes]
};

// One thread's buffers of a search: a chunk of one row.
struct alignas(64) SearchScratch {
  float z[kChunk];
  uint32_t words[kChunk + 8];  // columns begin anywhere in a group of four
};

struct IsaTable {
  const char* name;
  void (*run_panel)(const Panel&, const Buffers&);
  void (*exp_run)(const float* x, float* out, int64_t n);
  void (*run_search)(const SearchPanel&, SearchScratch* scratch);  // scratch [threads]
  void (*gumbel_run)(int64_t seed, int64_t row, int64_t first_column, float* out, int64_t n);
  void (*gather_run)(const Matrix& m, const int64_t* positives, float* dots, float* z_pos);
  void (*visit_matrix)(const Panel&, bool first, bool columns, const Buffers&);
  void (*alike_run)(const Matrix& m, double* sums);
  void (*run_scaled)(const Panel&, const Buffers&);  // of panels with scales by row and column
};

// A product's blocks: of at most kProductRows rows and kProductWidth columns, at a depth of kProductDepth; and the
// columns that a thread packs at a time. These take at most 1 MiB, a core's L2 on the machine where the last two were
// the best of seven pairs, two cores of an AMD EPYC.
constexpr int64_t kProductRows = 14, kProductWidth = 32, kProductDepth = 1024, kProductCols = 512;

// How a product is done: a grid of parts, one for each thread, and their memory.
struct ProductPlan {
  int64_t row_parts = 1, col_parts = 1;
  int64_t rows = 0, cols = 0;  // of a part, but for the last ones
  int64_t height = 0;          // rows of a block
  int64_t group = 1;           // blocks of rows that are packed together
  int64_t of_rows = 0;         // words of these
  int64_t of_thread = 0;       // ... and of the columns behind it
  uint32_t* packed = nullptr;  // [threads, of_thread]
  int64_t of_sums = 0;         // sums of a thread, in rows of kProductCols
  float* sums = nullptr;       // [threads, of_sums], if the result is not float32
  // the entries of x, row by row: those of row i are row_start[i] ... row_start[i + 1] - 1; or null
  const int64_t *row_start = nullptr, *depths = nullptr;
  const float* values = nullptr;
};

namespace avx512bf16 {
void multiply(const Product&, const ProductPlan&);
}

namespace baseline {
void run_scaled(const Panel&, const Buffers&);
}
namespace avx2 {
void run_scaled(const Panel&, const Buffers&);
}
namespace avx512 {
void run_scaled(const Panel&, const Buffers&);
}

// The one that the machine runs with.
const IsaTable& chosen_isa();

extern const IsaTable kBaseline;
#ifdef CK_X86
extern const IsaTable kAvx2;
extern const IsaTable kAvx512;
#endif

}  // namespace ck
