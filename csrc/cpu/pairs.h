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

// One logit of a column, with what is added to it.
static inline float add_to_logit(const Pairs& pairs, int64_t column, float z) {
  return pairs.col_bias ? z + pairs.col_bias[column] : z;
}

// Puts the gap where the columns' ids are the row's.
static void leave_out_ids(int64_t id, const int64_t* __restrict ids, int64_t cols, float gap, float* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) z[j] = ids[j] == id ? gap : z[j];
}

// Some columns of row i of a panel, which lie in memory as `row`: as they are, or copied to `z` where something is said
// of their pairs, with `gap` in the place of those that are left out. j0: the first one's place in the panel.
static RowSource find_source(const Pairs& pairs, RowSource row, int64_t i, int64_t j0, int64_t cols, float gap,
                             float* z) {
  const int64_t first_column = pairs.first_column + j0;
  if (pairs.col_bias) add_biases(pairs.col_bias + j0, cols, copy_row(row, cols, z));
  if (pairs.row_ids) leave_out_ids(pairs.row_ids[i], pairs.col_ids + j0, cols, gap, copy_row(row, cols, z));
  const int64_t diagonal = pairs.diagonal == kNoDiagonal ? -1 : pairs.first_row + i + pairs.diagonal - first_column;
  if (diagonal >= 0 && diagonal < cols) copy_row(row, cols, z)[diagonal] = gap;
  for (int64_t k = 0; k < pairs.columns_count; ++k) {
    const int64_t column = pairs.columns[i * pairs.columns_count + k] - first_column;
    if (column >= 0 && column < cols) copy_row(row, cols, z)[column] = gap;
  }
  return row;
}
