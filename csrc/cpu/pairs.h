// Where the logits of a row come from, and all that is said of its pairs; included by one source file per instruction
// set inside its own namespace.

// The row's logits as a copy in `z` that can be written to.
static float* copy_row(RowSource& row, int64_t cols, float* z) {
  if (row.source == z) return z;
  const RowSource from = row;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) z[j] = from.source[j] * from.scale + from.bias;
  row = {z, 1.0f, 0.0f};
  return z;
}

// Adds the columns' biases.
static void add_biases(const float* __restrict bias, int64_t cols, float* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) z[j] += bias[j];
}

// A positive's logit with what is added to its column's: nothing where that leaves it out, of a row that must not
// count.
static inline float add_to_positive(const Pairs& pairs, int64_t column, float z) {
  const float bias = pairs.col_bias ? pairs.col_bias[column] : 0.0f;
  return bias == -__builtin_inff() ? z : z + bias;
}

// Puts the gap where the columns' ids are the row's.
static void leave_out_ids(int64_t id, const int64_t* __restrict ids, int64_t cols, float gap, float* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) z[j] = ids[j] == id ? gap : z[j];
}

// ... and where they are not.
static void leave_out_others(int64_t id, const int64_t* __restrict ids, int64_t cols, float gap, float* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) z[j] = ids[j] == id ? z[j] : gap;
}

// Puts -z in the place of z where the columns' ids are the row's, but for columns that their bias leaves out.
static void turn_ids(int64_t id, const int64_t* __restrict ids, const float* bias, int64_t cols, float* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) z[j] = ids[j] == id ? -z[j] : z[j];
  for (int64_t j = 0; bias && j < cols; ++j) z[j] = bias[j] == -__builtin_inff() ? bias[j] : z[j];
}

// Some columns of row i of a panel, which lie in memory as `row`: as they are, or copied to `z` where something is said
// of their pairs, with `gap` in the place of those that are left out. j0: the first one's place in the panel. SIGNED:
// pairs of equal ids are not left out, but positives.
template <bool SIGNED>
static RowSource find_source(const Pairs& pairs, RowSource row, int64_t i, int64_t j0, int64_t cols, float gap,
                             float* z) {
  const int64_t first_column = pairs.first_column + j0;
  const float* bias = pairs.col_bias ? pairs.col_bias + j0 : nullptr;
  if (bias) add_biases(bias, cols, copy_row(row, cols, z));
  if (pairs.row_ids && (SIGNED || pairs.equal_ids != kAlikeCount)) {
    const int64_t id = pairs.row_ids[i], *ids = pairs.col_ids + j0;
    float* copied = copy_row(row, cols, z);
    if (SIGNED) turn_ids(id, ids, bias, cols, copied);
    if (pairs.equal_ids == kAlikeAlone)
      leave_out_others(id, ids, cols, gap, copied);
    else if (!SIGNED)
      leave_out_ids(id, ids, cols, gap, copied);
  }
  const int64_t diagonal = pairs.diagonal == kNoDiagonal ? -1 : pairs.first_row + i + pairs.diagonal - first_column;
  if (diagonal >= 0 && diagonal < cols) copy_row(row, cols, z)[diagonal] = gap;
  for (int64_t k = 0; k < pairs.columns_count; ++k) {
    const int64_t column = pairs.columns[i * pairs.columns_count + k] - first_column;
    if (column >= 0 && column < cols) copy_row(row, cols, z)[column] = gap;
  }
  return row;
}
