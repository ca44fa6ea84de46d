// The CPU's search of one panel of scores, included by one source file per instruction set inside its own namespace.
//
// A row is a thread's unit of work: chunk by chunk its logits go to a buffer, with noise and with gaps where pairs are
// left out, then the buffer's largest entry or its counts join the row's own. Results do not depend on threads.

// words[j] becomes the word of column first + j, with its group's other columns around it. Returns where column
// `first` lies.
static int64_t find_words(int64_t seed, int64_t row, int64_t first, int64_t n, uint32_t* words) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  const uint32_t group0 = static_cast<uint32_t>(first >> 2), counter_row = static_cast<uint32_t>(row);
  const int64_t before = first & 3;
  const int64_t groups = (before + n + 3) >> 2;
#pragma omp simd
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t w0, w1, w2, w3;
    philox_words(group0 + static_cast<uint32_t>(g), counter_row, key0, key1, w0, w1, w2, w3);
    words[4 * g] = w0;
    words[4 * g + 1] = w1;
    words[4 * g + 2] = w2;
    words[4 * g + 3] = w3;
  }
  return before;
}

// The logits of one chunk of a row, with noise where it is wanted, and `gap` where a pair is left out.
static void find_logits(const SearchPanel& p, int64_t i, int64_t col0, int64_t cols, float gap, SearchScratch& s) {
  const RowSource lies = {p.scores + i * p.stride + col0, p.params[0], p.params[1]};
  const RowSource row = find_source<false>(p.pairs, lies, i, col0, cols, gap, s.z);
  float* z = s.z;
  if (p.term == SearchTerm::kGumbelMax) {
    const int64_t first_row = p.pairs.first_row, first_column = p.pairs.first_column;
    const uint32_t* word = s.words + find_words(*p.seed, first_row + i, first_column + col0, cols, s.words);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) z[j] = (row.source[j] * row.scale + row.bias) + gumbel_from(word[j]);
  } else if (row.source != z) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) z[j] = row.source[j] * row.scale + row.bias;
  }
}

static void keep_largest(const float* z, int64_t cols, int64_t first_column, float& best, int64_t& best_column) {
  float largest = -__builtin_inff();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < cols; ++j) largest = z[j] > largest ? z[j] : largest;
  if (!(largest > best)) return;
  int64_t j = 0;
  while (z[j] != largest) ++j;
  best = largest;
  best_column = first_column + j;
}

static void add_counts(const float* z, int64_t cols, float low, float high, int64_t& below, int64_t& above) {
  int32_t under = 0, over = 0;  // of a chunk
#pragma omp simd reduction(+ : under, over)
  for (int64_t j = 0; j < cols; ++j) {
    under += z[j] < low ? 1 : 0;
    over += z[j] > high ? 1 : 0;
  }
  below += under;
  above += over;
}

static void run_search(const SearchPanel& p, SearchScratch* scratch) {
  const bool rank = p.term == SearchTerm::kRank;
  // NaN lies neither below nor above a bound
  const float gap = rank ? __builtin_nanf("") : -__builtin_inff();
#pragma omp parallel num_threads(p.threads)
  {
#ifdef _OPENMP
    SearchScratch& s = scratch[omp_get_thread_num()];
#else
    SearchScratch& s = scratch[0];
#endif
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t col0 = 0; col0 < p.cols; col0 += kChunk) {
        const int64_t cols = smaller(kChunk, p.cols - col0);
        find_logits(p, i, col0, cols, gap, s);
        if (rank)
          add_counts(s.z, cols, p.low[i], p.high[i], p.below[i], p.above[i]);
        else
          keep_largest(s.z, cols, p.pairs.first_column + col0, p.best[i], p.best_column[i]);
      }
  }
}

static void gumbel_run(int64_t seed, int64_t row, int64_t first_column, float* out, int64_t n) {
  uint32_t words[kChunk + 8];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t count = smaller(kChunk, n - start);
    const uint32_t* word = words + find_words(seed, row, first_column + start, count, words);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[start + j] = gumbel_from(word[j]);
  }
}
