// The members of a panel, each written once: X(type, name, default, comment). api.h makes structs of these tables,
// bindings.cpp makes keywords; `row_` or `col_` stands before a side's. backends/native.py goes by the same names.
#pragma once

// Which pairs count. Null pointers: nothing is said of them.
#define CK_PAIRS_MEMBERS(X)                                                                                       \
  X(int64_t, diagonal, kNoDiagonal, "of row i of the whole matrix, column i + diagonal is left out")              \
  X(const int64_t*, columns, nullptr, "[rows, columns_count] columns of the whole matrix that a row leaves out")  \
  X(int64_t, columns_count, 0, "columns that a row leaves out, -1 for none")                                      \
  X(const float*, col_bias, nullptr, "[cols] added to the logits of a column")                                    \
  X(const int64_t*, row_ids, nullptr, "[rows] pairs of equal ids are left out; the sigmoid term's positives")     \
  X(int, equal_ids, 0, "or: kAlikeCount, kAlikeAlone")                                                            \
  X(const int64_t*, col_ids, nullptr, "[cols]")                                                                   \
  X(const float*, row_ceiling, nullptr, "[rows] pairs whose scale * score is higher are left out of the row's")   \
  X(const float*, col_ceiling, nullptr, "[cols] ... of the column's; or null")                                    \
  X(const float*, guide, nullptr, "[rows, cols] a guide's scores, or null")                                       \
  X(int64_t, guide_stride, 0, "from one row of them to the next")                                                 \
  X(const float*, row_threshold, nullptr, "[rows] pairs whose guide's score is higher are left out of the row's") \
  X(const float*, col_threshold, nullptr, "[cols] ... of the column's; or null")                                  \
  X(const float*, row_scale, nullptr, "[rows] scale of a score's logit among its row's, in place of the one")     \
  X(const float*, col_scale, nullptr, "[cols] ... among its column's; both or none")                              \
  X(int64_t, first_row, 0, "where the panel begins in the whole matrix")                                          \
  X(int64_t, first_column, 0, "")

// A vector per row (or column) of the panel. Null pointers: this side is not wanted.
#define CK_SIDE_MEMBERS(X)                                                                                         \
  X(float*, shift, nullptr, "[n] running state, updated in place: a maximum (exponential)")                        \
  X(float*, sum, nullptr, "[n] and the sum, of exp(z - shift)")                                                    \
  X(const float*, normalizer_shift, nullptr, "[n] log-normaliser a_i (rows) or b_j (columns), as two numbers:")    \
  X(const float*, normalizer_rest, nullptr, "[n] shift + rest, never added up; a rest of +inf is of no negatives") \
  X(const float*, gain, nullptr, "[n] r_i (rows) or c_j (columns); null in a reduce panel")                        \
  X(const float*, target, nullptr, "[n] subtracted from the weights of pairs of other ids that count, and")        \
  X(const float*, target_alike, nullptr, "[n] from those of equal ids; both sides' or none, and without sums")     \
  X(float*, dscale, nullptr, "[n] += sum of the side's w * (score - center); with scales by row and column, or null")

// One block of the score matrix, beside its pairs and its two sides.
#define CK_PANEL_MEMBERS(X)                                                                                       \
  X(PairTerm, term, PairTerm::kExponential, "")                                                                   \
  X(float*, scores, nullptr, "[rows, cols] dot products <x_i, y_j>; null: the CUDA pass makes them from x and y") \
  X(int64_t, rows, 0, "")                                                                                         \
  X(int64_t, cols, 0, "")                                                                                         \
  X(int64_t, stride, 0, "from one row of scores to the next")                                                     \
  X(const float*, params, nullptr, "[3] scale, bias, center")                                                     \
  X(void*, weights, nullptr, "[rows, cols] becomes scale * dL/dz; may be the scores; null in a reduce panel")     \
  X(Dtype, weights_dtype, Dtype::kFloat32, "")                                                                    \
  X(int64_t, weights_stride, 0, "")                                                                               \
  X(double*, dparams, nullptr, "[2] += sum of w * (score - center), sum of w; null: not wanted")                  \
  X(int, threads, 1, "the CPU's")                                                                                 \
  /* the rest is CUDA's */                                                                                        \
  X(const void*, x, nullptr, "[rows, depth] operand in 16 bits, where there are no scores")                       \
  X(const void*, y, nullptr, "[cols, depth]")                                                                     \
  X(Dtype, operands, Dtype::kBFloat16, "of both")                                                                 \
  X(int64_t, depth, 0, "")                                                                                        \
  X(int64_t, x_stride, 0, "")                                                                                     \
  X(int64_t, y_stride, 0, "")                                                                                     \
  X(const float*, factor, nullptr, "[1] what dL/dz leaves times in the weights' place; null: the scale")          \
  X(int, device, 0, "")                                                                                           \
  X(void*, stream, nullptr, "a cudaStream_t")                                                                     \
  X(void*, scratch, nullptr, "of scratch_bytes, aligned to 8")                                                    \
  X(int64_t, scratch_bytes, 0, "")

// One block of the score matrix of which only each row's best column, or two counts, are wanted; beside its pairs.
#define CK_SEARCH_PANEL_MEMBERS(X)                                                   \
  X(SearchTerm, term, SearchTerm::kMaximum, "")                                      \
  X(const float*, scores, nullptr, "[rows, cols] dot products <x_i, y_j>")           \
  X(int64_t, rows, 0, "")                                                            \
  X(int64_t, cols, 0, "")                                                            \
  X(int64_t, stride, 0, "from one row of scores to the next")                        \
  X(const float*, params, nullptr, "[3] scale, bias, center")                        \
  X(const int64_t*, seed, nullptr, "[1] of the noise")                               \
  X(float*, best, nullptr, "[rows] largest z (with noise) so far, updated in place") \
  X(int64_t*, best_column, nullptr, "[rows] its column of the whole matrix")         \
  X(const float*, low, nullptr, "[rows] bounds")                                     \
  X(const float*, high, nullptr, "[rows]")                                           \
  X(int64_t*, below, nullptr, "[rows] += how many z lie below low")                  \
  X(int64_t*, above, nullptr, "[rows] += how many z lie above high")                 \
  X(int, threads, 1, "")
