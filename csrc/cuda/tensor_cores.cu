// The product of a tile on the tensor cores (mma.sync, from sm_80 on), with the pass over it in its epilogue: the
// scores never leave the registers.
#include "epilogue.h"
#include "kernels.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kServes = false;  // an empty kernel in its place, which dispatch.cu never launches
#else
constexpr bool kServes = true;
#endif

constexpr int kPieces = 4;     // of 16 bytes, of the operands' rows in one stage
constexpr int kPieceSize = 8;  // elements of a piece
constexpr int kStages = 3;     // one is multiplied while two are on their way
[[maybe_unused]] constexpr int kDepth = kPieces * kPieceSize;

// Rows of x and y, 64 bytes each: in 128 bytes, all that the banks deliver at once, there are two rows. Pieces change
// places within a row so that the same piece of eight rows in sequence lies in eight different places.
struct Stage {
  uint4 x[kTile][kPieces], y[kTile][kPieces];
};
__device__ __forceinline__ int piece_place(int row, int piece) { return piece ^ (row / 2 % kPieces); }

static_assert(kStages * sizeof(Stage) <= 48 * 1024, "more shared memory has to be asked for");
static_assert(sizeof(EpilogueMemory) <= kStages * sizeof(Stage), "the epilogue takes the stages' place");

// Where a row of y lies in the stage: mma.sync gives lane t of four the columns 2 t and 2 t + 1 of each eight. For them
// to be neighbours over four times eight columns (8 t to 8 t + 7, as ThreadPlace has it), the columns are renamed.
__device__ __forceinline__ int y_place(int col) {
  const int quad_lane = col % 32 / 8, eight = col % 8 / 2, odd = col % 2;
  return col / 32 * 32 + eight * 8 + quad_lane * 2 + odd;
}

// Starts copying the elements [begin, begin + kDepth) of the tile's rows; zeros beyond the panel and the depth.
[[maybe_unused]] __device__ __forceinline__ void fetch(const Panel& p, const TilePlace& tile, int64_t begin,
                                                       Stage& stage) {
  const uint16_t* const x = static_cast<const uint16_t*>(p.x) + tile.row0() * p.x_stride;
  const uint16_t* const y = static_cast<const uint16_t*>(p.y) + tile.col0() * p.y_stride;
#pragma unroll
  for (int k = 0; k < kTile * kPieces / kThreads; ++k) {
    const int number = static_cast<int>(threadIdx.x) + k * kThreads;
    const int row = number / kPieces, piece = number % kPieces;
    const int64_t at = begin + piece * kPieceSize;
    const bool x_inside = row < tile.rows && at < p.depth, y_inside = row < tile.cols && at < p.depth;
    copy_async(&stage.x[row][piece_place(row, piece)], x_inside ? x + row * p.x_stride + at : x, x_inside ? 16 : 0);
    const int place = y_place(row);
    copy_async(&stage.y[place][piece_place(place, piece)], y_inside ? y + row * p.y_stride + at : y, y_inside ? 16 : 0);
  }
}

// Adds the stage's products to the scores of the warp's 64 x 32.
template <Dtype OPERANDS>
__device__ __forceinline__ void multiply(const Stage& stage, const ThreadPlace& mine, Scores& s) {
  constexpr int kSixteens = kTile / kWarpsDown / 16;  // of rows
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t b[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // sixteen columns: the first eight's two pieces, then the other eight's
      const int row = mine.warp_across * 32 + half * 16 + mine.lane / 16 * 8 + mine.lane % 8;
      load_matrices(&stage.y[row][piece_place(row, 2 * step + mine.lane / 8 % 2)], b[half]);
    }
#pragma unroll
    for (int sixteen = 0; sixteen < kSixteens; ++sixteen) {
      uint32_t a[4];  // both eights' first piece, then their second
      const int row = mine.warp_down * 64 + sixteen * 16 + mine.lane % 16;
      load_matrices(&stage.x[row][piece_place(row, 2 * step + mine.lane / 16)], a);
#pragma unroll
      for (int eight = 0; eight < 4; ++eight)
        multiply_add<OPERANDS>(&s.score[2 * sixteen][2 * eight], &s.score[2 * sixteen + 1][2 * eight], a,
                               b[eight / 2][eight % 2 * 2], b[eight / 2][eight % 2 * 2 + 1]);
    }
  }
}

// The tile's dot products, in a pipeline of kStages. Shared memory is free when it returns.
template <Dtype OPERANDS>
__device__ __forceinline__ void multiply_tile(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                              Stage* stages, Scores& s) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) s.score[i][j] = 0.0f;
  const int steps = static_cast<int>((p.depth + kDepth - 1) / kDepth);
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(p, tile, static_cast<int64_t>(step) * kDepth, stages[step]);
    end_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the stage that is fetched next
    const int next = step + kStages - 1;
    if (next < steps) fetch(p, tile, static_cast<int64_t>(next) * kDepth, stages[next % kStages]);
    end_copies();
    multiply<OPERANDS>(stages[step % kStages], mine, s);
  }
  wait_for_copies<0>();
  __syncthreads();
}

template <class Term, bool IDS, bool CAPPED, Dtype OPERANDS, bool SUMS, bool WEIGHTS>
__global__ __launch_bounds__(kThreads, 2) void tensor_core_kernel(const __grid_constant__ Panel p) {
  if constexpr (kServes) {
    const TilePlace tile(p, blockIdx.x);
    const ThreadPlace mine;
    const Alike<IDS> alike(p, tile, mine);
    const Guided<CAPPED> guided(p, tile, mine);
    Scores scores;
    multiply_tile<OPERANDS>(p, tile, mine, reinterpret_cast<Stage*>(shared_memory), scores);
    finish_tile<Term, IDS, CAPPED, SUMS, WEIGHTS>(p, tile, mine, scores, alike, guided,
                                                  *reinterpret_cast<EpilogueMemory*>(shared_memory));
  }
}

template <class Term, bool IDS, bool CAPPED, Dtype OPERANDS>
TileKernel choose(bool sums, bool weights) {
  const unsigned bytes = kStages * sizeof(Stage);
  if constexpr (!Term::kTargets) {  // which have no sums
    if (!weights) return {tensor_core_kernel<Term, IDS, CAPPED, OPERANDS, true, false>, bytes};
    if (sums) return {tensor_core_kernel<Term, IDS, CAPPED, OPERANDS, true, true>, bytes};
  }
  return {tensor_core_kernel<Term, IDS, CAPPED, OPERANDS, false, true>, bytes};
}

template <class Term, bool IDS, bool CAPPED>
TileKernel choose(Dtype operands, bool sums, bool weights) {
  return operands == Dtype::kBFloat16 ? choose<Term, IDS, CAPPED, Dtype::kBFloat16>(sums, weights)
                                      : choose<Term, IDS, CAPPED, Dtype::kFloat16>(sums, weights);
}

template <class Term, bool CAPPED = false>
TileKernel choose_ids(bool ids, Dtype operands, bool sums, bool weights) {
  return ids ? choose<Term, true, CAPPED>(operands, sums, weights)
             : choose<Term, false, CAPPED>(operands, sums, weights);
}

}  // namespace

TileKernel tensor_cores(Kind kind, Dtype operands, bool sums, bool weights) {
  if (kind.targets) return choose_ids<WithTargets>(kind.ids, operands, sums, weights);
  if (kind.capped) return choose_ids<BothSides, true>(kind.ids, operands, sums, weights);
  return kind.term == PairTerm::kSigmoid ? choose_ids<Sigmoid>(kind.ids, operands, sums, weights)
                                         : choose_ids<BothSides>(kind.ids, operands, sums, weights);
}

}  // namespace cuda
}  // namespace ck
