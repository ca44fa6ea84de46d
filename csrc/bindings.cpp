// The Python module contrastive_kernels._C: addresses and sizes come in as integers (0 for a null pointer).
#include <pybind11/pybind11.h>

#include "include/api.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

ck::Panel make_panel(int term, Address scores, int64_t rows, int64_t cols, int64_t stride, Address params,
                     Address exclude, int64_t exclude_count, int64_t first_column, int threads) {
  ck::Panel p;
  p.term = static_cast<ck::PairTerm>(term);
  p.scores = pointer<float>(scores);
  p.rows = rows;
  p.cols = cols;
  p.stride = stride;
  p.params = pointer<const float>(params);
  p.exclude = pointer<const int64_t>(exclude);
  p.exclude_count = exclude_count;
  p.first_column = first_column;
  p.threads = threads;
  return p;
}

void set_states(ck::Panel& p, Address row_reference, Address row_sum, Address col_reference, Address col_sum) {
  p.row.reference = pointer<float>(row_reference);
  p.row.sum = pointer<float>(row_sum);
  p.col.reference = pointer<float>(col_reference);
  p.col.sum = pointer<float>(col_sum);
}

void reduce_panel(int term, Address scores, int64_t rows, int64_t cols, int64_t stride, Address params, Address exclude,
                  int64_t exclude_count, int64_t first_column, int threads, Address row_reference, Address row_sum,
                  Address col_reference, Address col_sum) {
  ck::Panel p = make_panel(term, scores, rows, cols, stride, params, exclude, exclude_count, first_column, threads);
  set_states(p, row_reference, row_sum, col_reference, col_sum);
  py::gil_scoped_release release;
  ck::reduce_panel(p);
}

void weight_panel(int term, Address scores, int64_t rows, int64_t cols, int64_t stride, Address params, Address exclude,
                  int64_t exclude_count, int64_t first_column, int threads, Address row_reference, Address row_sum,
                  Address col_reference, Address col_sum, Address row_normalizer, Address row_gain,
                  Address col_normalizer, Address col_gain, Address weights, int weights_dtype, int64_t weights_stride,
                  Address dparams) {
  ck::Panel p = make_panel(term, scores, rows, cols, stride, params, exclude, exclude_count, first_column, threads);
  set_states(p, row_reference, row_sum, col_reference, col_sum);
  p.row.normalizer = pointer<const float>(row_normalizer);
  p.row.gain = pointer<const float>(row_gain);
  p.col.normalizer = pointer<const float>(col_normalizer);
  p.col.gain = pointer<const float>(col_gain);
  p.weights = pointer<void>(weights);
  p.weights_dtype = static_cast<ck::Dtype>(weights_dtype);
  p.weights_stride = weights_stride;
  p.dparams = pointer<double>(dparams);
  py::gil_scoped_release release;
  ck::weight_panel(p);
}

void search_panel(int term, Address scores, int64_t rows, int64_t cols, int64_t stride, Address params, Address exclude,
                  int64_t exclude_count, int64_t first_row, int64_t first_column, int threads, Address row_ids,
                  Address col_ids, Address seed, Address best, Address best_column, Address low, Address high,
                  Address below, Address above) {
  ck::SearchPanel p;
  p.term = static_cast<ck::SearchTerm>(term);
  p.scores = pointer<const float>(scores);
  p.rows = rows;
  p.cols = cols;
  p.stride = stride;
  p.params = pointer<const float>(params);
  p.exclude = pointer<const int64_t>(exclude);
  p.exclude_count = exclude_count;
  p.first_row = first_row;
  p.first_column = first_column;
  p.threads = threads;
  p.row_ids = pointer<const int64_t>(row_ids);
  p.col_ids = pointer<const int64_t>(col_ids);
  p.seed = pointer<const int64_t>(seed);
  p.best = pointer<float>(best);
  p.best_column = pointer<int64_t>(best_column);
  p.low = pointer<const float>(low);
  p.high = pointer<const float>(high);
  p.below = pointer<int64_t>(below);
  p.above = pointer<int64_t>(above);
  py::gil_scoped_release release;
  ck::search_panel(p);
}

void gumbel_array(int64_t seed, int64_t row, int64_t first_column, Address out, int64_t n) {
  ck::gumbel_array(seed, row, first_column, pointer<float>(out), n);
}

void exp_array(Address x, Address out, int64_t n) { ck::exp_array(pointer<const float>(x), pointer<float>(out), n); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU's pass over one panel of scores. Addresses and sizes are integers; 0 is a null pointer.";
  m.def("reduce_panel", &reduce_panel);
  m.def("weight_panel", &weight_panel);
  m.def("search_panel", &search_panel);
  m.def("gumbel_array", &gumbel_array);
  m.def("exp_array", &exp_array);
  m.def("instruction_set", &ck::instruction_set);
  m.def("set_instruction_set", &ck::set_instruction_set);
}
