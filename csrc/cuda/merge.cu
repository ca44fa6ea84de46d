// The second stage of every reduction: the blocks' partial results, in their order, onto what was there before.
#include "epilogue.h"
#include "kernels.h"
#include "runtime.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

// One row's (or column's) partial results [parts, n] onto its state.
__device__ __forceinline__ void merge_vector(const Side& side, const float* reference, const float* sum, int64_t parts,
                                             int64_t n, int64_t i) {
  if (i >= n) return;
  float total = side.sum[i], highest = side.reference ? side.reference[i] : 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < parts; ++k) {
    if (side.reference)
      merge_exponential(highest, total, reference[k * n + i], sum[k * n + i]);
    else
      total += sum[k * n + i];
  }
  side.sum[i] = total;
  if (side.reference) side.reference[i] = highest;
}

// Sums of the blocks' [blocks, 2] by one block of threads: each takes every kThreads-th, then halves are added.
__device__ __forceinline__ void merge_params(const double* params, int64_t blocks, double* out, double (*sums)[2]) {
  const int thread = static_cast<int>(threadIdx.x);
  double dscale = 0.0, dbias = 0.0;
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

int64_t blocks_for(int64_t n) { return (n + kThreads - 1) / kThreads; }

}  // namespace

// Blocks for the rows first, then for the columns, then one for the parameters.
__global__ __launch_bounds__(kThreads) void merge_kernel(const __grid_constant__ Panel p) {
  const int64_t down = (p.rows + kTile - 1) / kTile, across = (p.cols + kTile - 1) / kTile;
  const int64_t row_blocks = p.row.sum ? (p.rows + kThreads - 1) / kThreads : 0;
  const int64_t col_blocks = p.col.sum ? (p.cols + kThreads - 1) / kThreads : 0;
  const int64_t block = blockIdx.x;
  const Scratch scratch(p);
  if (block < row_blocks)
    merge_vector(p.row, scratch.row_reference, scratch.row_sum, across, p.rows, block * kThreads + threadIdx.x);
  else if (block < row_blocks + col_blocks)
    merge_vector(p.col, scratch.col_reference, scratch.col_sum, down, p.cols,
                 (block - row_blocks) * kThreads + threadIdx.x);
  else
    merge_params(scratch.params, down * across, p.dparams, reinterpret_cast<double (*)[2]>(shared_memory));
}

void launch_merge(const Panel& p) {
  const int64_t blocks =
      (p.row.sum ? blocks_for(p.rows) : 0) + (p.col.sum ? blocks_for(p.cols) : 0) + (p.dparams ? 1 : 0);
  if (blocks == 0) return;
  launch("merge_kernel", merge_kernel, static_cast<unsigned>(blocks), kThreads, kThreads * 2 * sizeof(double), p.stream,
         p);
}

}  // namespace cuda
}  // namespace ck
