// The second stage of every reduction: the blocks' partial results, in their order, onto what was there before.
#include "epilogue.h"
#include "kernels.h"
#include "runtime.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

// A block folds kMergeRows rows (or columns), its warps every kWarps-th of their partial results.
constexpr int kMergeRows = 32;

struct Partial {
  float shift, sum;
};

// What a block needs of shared memory.
union MergeMemory {
  Partial partial[kWarps][kMergeRows];
  double params[kThreads][2];
};

// Partial results [parts, n] onto the state: each warp's share first, then the warps' in their order.
template <class Term>
__device__ __forceinline__ void merge_vector(const Side& side, const float* shift, const float* sum, int64_t parts,
                                             int64_t n, int64_t block, Partial (*partial)[kMergeRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kMergeRows, warp = static_cast<int>(threadIdx.x) / kMergeRows;
  const int64_t i = block * kMergeRows + lane;
  Partial mine = {0.0f, 0.0f};
  if (i < n)
#pragma unroll 4
    for (int64_t k = warp; k < parts; k += kWarps)
      Term::merge(&mine.shift, &mine.sum, shift + k * n + i, sum + k * n + i, 0);
  partial[warp][lane] = mine;
  __syncthreads();
  if (i >= n || warp > 0) return;
  Partial all = {Term::kHasShift ? side.shift[i] : 0.0f, side.sum[i]};
  for (int k = 0; k < kWarps; ++k) Term::merge(&all.shift, &all.sum, &partial[k][lane].shift, &partial[k][lane].sum, 0);
  side.sum[i] = all.sum;
  if (Term::kHasShift) side.shift[i] = all.shift;
}

// Sums of the blocks' [blocks, 2] by one block of threads: each takes every kThreads-th, then halves are added.
__device__ __forceinline__ void merge_params(const double* params, int64_t blocks, double* out, double (*sums)[2]) {
  const int thread = static_cast<int>(threadIdx.x);
  double dscale = 0.0, dbias = 0.0;
#pragma unroll 4
  for (int64_t k = thread; k < blocks; k += kThreads) {
    dscale += params[2 * k];
    dbias += params[2 * k + 1];
  }
  sums[thread][0] = dscale;
  sums[thread][1] = dbias;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sums[thread][0] += sums[thread + half][0];
      sums[thread][1] += sums[thread + half][1];
    }
  }
  if (thread == 0) {
    out[0] += sums[0][0];
    out[1] += sums[0][1];
  }
}

// Blocks for n rows (or columns) whose sums are wanted.
__host__ __device__ __forceinline__ int64_t blocks_for(const Side& side, int64_t n) {
  return side.sum ? (n + kMergeRows - 1) / kMergeRows : 0;
}

}  // namespace

// Blocks for the rows first, then for the columns, then one for the parameters.
template <class Term>
__global__ __launch_bounds__(kThreads) void merge_kernel(const __grid_constant__ Panel p) {
  MergeMemory& m = *reinterpret_cast<MergeMemory*>(shared_memory);
  const int64_t down = (p.rows + kTile - 1) / kTile, across = (p.cols + kTile - 1) / kTile;
  const int64_t row_blocks = blocks_for(p.row, p.rows), col_blocks = blocks_for(p.col, p.cols);
  const int64_t block = blockIdx.x;
  const Scratch scratch(p);
  if (block < row_blocks)
    merge_vector<Term>(p.row, scratch.row_shift, scratch.row_sum, across, p.rows, block, m.partial);
  else if (block < row_blocks + col_blocks)
    merge_vector<Term>(p.col, scratch.col_shift, scratch.col_sum, down, p.cols, block - row_blocks, m.partial);
  else
    merge_params(scratch.params, down * across, p.dparams, m.params);
}

void launch_merge(const Panel& p) {
  const int64_t blocks = blocks_for(p.row, p.rows) + blocks_for(p.col, p.cols) + (p.dparams ? 1 : 0);
  if (blocks == 0) return;
  const auto kernel = p.term == PairTerm::kSigmoid ? merge_kernel<Sigmoid> : merge_kernel<BothSides>;
  launch("merge_kernel", kernel, static_cast<unsigned>(blocks), kThreads, sizeof(MergeMemory), p.stream, p);
}

}  // namespace cuda
}  // namespace ck
