// The Python module contrastive_kernels._C. A panel comes in as keywords, named in members.h: integers all of them,
// where 0 is a null pointer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "include/api.h"

namespace py = pybind11;

namespace {

// Numbers and addresses both come as Python's integers.
int64_t integer(py::handle value) {
  const long long number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <typename T>
void assign(T*& member, py::handle value) {
  member = reinterpret_cast<T*>(integer(value));
}
template <typename T, std::enable_if_t<!std::is_pointer_v<T>, int> = 0>
void assign(T& member, py::handle value) {
  member = static_cast<T>(integer(value));
}

// A keyword: what sets its member, and what there is to say of it.
template <typename Panel>
struct Keyword {
  void (*set)(Panel&, py::handle);
  const char* comment;
};
template <typename Panel>
using Keywords = std::unordered_map<std::string_view, Keyword<Panel>>;

template <typename Panel, auto Member>
void set(Panel& panel, py::handle value) {
  assign(panel.*Member, value);
}
template <typename Panel, auto Part, auto Member>
void set_in(Panel& panel, py::handle value) {
  assign(panel.*Part.*Member, value);
}

using P = ck::Panel;
using Q = ck::SearchPanel;

// Every member of a panel by its name.
template <typename Panel>
const Keywords<Panel>& keywords();

#define CK_OF_PANEL(type, name, initial, comment) {#name, {set<P, &P::name>, comment}},
#define CK_OF_SEARCH(type, name, initial, comment) {#name, {set<Q, &Q::name>, comment}},
#define CK_OF_PANEL_PAIRS(type, name, initial, comment) {#name, {set_in<P, &P::pairs, &ck::Pairs::name>, comment}},
#define CK_OF_SEARCH_PAIRS(type, name, initial, comment) {#name, {set_in<Q, &Q::pairs, &ck::Pairs::name>, comment}},
#define CK_OF_ROWS(type, name, initial, comment) {"row_" #name, {set_in<P, &P::row, &ck::Side::name>, comment}},
#define CK_OF_COLS(type, name, initial, comment) {"col_" #name, {set_in<P, &P::col, &ck::Side::name>, comment}},

template <>
const Keywords<P>& keywords<P>() {
  static const Keywords<P> table = {CK_PANEL_MEMBERS(CK_OF_PANEL) CK_PAIRS_MEMBERS(CK_OF_PANEL_PAIRS)
                                        CK_SIDE_MEMBERS(CK_OF_ROWS) CK_SIDE_MEMBERS(CK_OF_COLS)};
  return table;
}

template <>
const Keywords<Q>& keywords<Q>() {
  static const Keywords<Q> table = {CK_SEARCH_PANEL_MEMBERS(CK_OF_SEARCH) CK_PAIRS_MEMBERS(CK_OF_SEARCH_PAIRS)};
  return table;
}

// {keyword: comment}, for whoever looks for it in Python.
template <typename Panel>
py::dict comments() {
  py::dict all;
  for (const auto& keyword : keywords<Panel>()) all[py::str(std::string(keyword.first))] = keyword.second.comment;
  return all;
}

template <typename Panel>
Panel make_panel(const py::kwargs& arguments) {
  Panel panel;
  const Keywords<Panel>& known = keywords<Panel>();
  for (const std::pair<py::handle, py::handle> item : arguments) {
    Py_ssize_t size = 0;
    const char* name = PyUnicode_AsUTF8AndSize(item.first.ptr(), &size);
    if (!name) throw py::error_already_set();
    const auto found = known.find(std::string_view(name, static_cast<size_t>(size)));
    if (found == known.end()) throw py::type_error("a panel has no member " + std::string(name));
    found->second.set(panel, item.second);
  }
  return panel;
}

template <typename Panel, void (*Pass)(const Panel&)>
void run(const py::kwargs& arguments) {
  const Panel panel = make_panel<Panel>(arguments);
  py::gil_scoped_release release;
  Pass(panel);
}

// A matrix's arguments come by position: keywords cost as much as a small matrix.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ck::Matrix make_matrix(uintptr_t scores, uintptr_t weights, int64_t rows, int64_t cols, std::optional<int64_t> diagonal,
                       uintptr_t columns, int64_t columns_count, uintptr_t col_bias, uintptr_t positives,
                       std::optional<int64_t> offset, float scale, float bias) {
  ck::Matrix m;
  m.scores = pointer<const float>(scores), m.weights = pointer<float>(weights);
  m.rows = rows, m.cols = cols;
  m.pairs.diagonal = diagonal.value_or(ck::kNoDiagonal);
  m.pairs.columns = pointer<const int64_t>(columns), m.pairs.columns_count = columns_count;
  m.pairs.col_bias = pointer<const float>(col_bias);
  m.positives = pointer<const int64_t>(positives), m.offset = offset.value_or(ck::kNoDiagonal);
  m.scale = scale, m.bias = bias;
  return m;
}

void softmax_matrix(uintptr_t scores, uintptr_t weights, int64_t rows, int64_t cols, std::optional<int64_t> diagonal,
                    uintptr_t columns, int64_t columns_count, uintptr_t col_bias, uintptr_t positives,
                    std::optional<int64_t> offset, float scale, float bias, uintptr_t gain, double share, bool both,
                    bool symmetric, uintptr_t out, int threads) {
  ck::Matrix m = make_matrix(scores, weights, rows, cols, diagonal, columns, columns_count, col_bias, positives, offset,
                             scale, bias);
  m.gain = pointer<const float>(gain), m.share = share, m.out = pointer<double>(out), m.threads = threads;
  py::gil_scoped_release release;
  ck::softmax_matrix(m, both, symmetric);
}

void weighted_matrix(int term, uintptr_t scores, uintptr_t weights, int64_t rows, int64_t cols,
                     std::optional<int64_t> diagonal, uintptr_t columns, int64_t columns_count, uintptr_t col_bias,
                     uintptr_t positives, std::optional<int64_t> offset, float scale, float bias,
                     uintptr_t row_normalizer, uintptr_t row_gain, uintptr_t col_normalizer, uintptr_t col_gain,
                     double share, bool relative, uintptr_t row_state, uintptr_t col_state, uintptr_t dots,
                     uintptr_t out, int threads) {
  ck::Matrix m = make_matrix(scores, weights, rows, cols, diagonal, columns, columns_count, col_bias, positives, offset,
                             scale, bias);
  m.share = share, m.out = pointer<double>(out), m.threads = threads;
  const ck::GivenSide row = {pointer<const float>(row_normalizer), pointer<const float>(row_gain),
                             pointer<float>(row_state)};
  const ck::GivenSide col = {pointer<const float>(col_normalizer), pointer<const float>(col_gain),
                             pointer<float>(col_state)};
  py::gil_scoped_release release;
  ck::weighted_matrix(m, static_cast<ck::PairTerm>(term), row, col, relative, pointer<float>(dots));
}

void exp_array(uintptr_t x, uintptr_t out, int64_t n) {
  ck::exp_array(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), n);
}

void gumbel_array(int64_t seed, int64_t row, int64_t first_column, uintptr_t out, int64_t n) {
  ck::gumbel_array(seed, row, first_column, reinterpret_cast<float*>(out), n);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The pass over one panel of scores, on the CPU and in CUDA. A panel's members are keywords; see members.h.";
  m.attr("_panel_members") = comments<P>();
  m.attr("_search_panel_members") = comments<Q>();
  m.def("reduce_panel", &run<P, ck::reduce_panel>);
  m.def("weight_panel", &run<P, ck::weight_panel>);
  m.def("search_panel", &run<Q, ck::search_panel>);
  m.def("softmax_matrix", &softmax_matrix);
  m.def("weighted_matrix", &weighted_matrix);
  m.def("exp_array", &exp_array);
  m.def("gumbel_array", &gumbel_array);
  m.def("instruction_set", &ck::instruction_set);
  m.def("set_instruction_set", &ck::set_instruction_set);
  m.def("cuda_reduce_panel", &run<P, ck::cuda::reduce_panel>);
  m.def("cuda_weight_panel", &run<P, ck::cuda::weight_panel>);
  m.def("cuda_scratch_bytes", &ck::cuda::scratch_bytes);
  m.def("cuda_version", &ck::cuda::version);
  m.def("cuda_architectures", &ck::cuda::architectures);
  m.def("cuda_why_not", &ck::cuda::why_not);
  m.def("cuda_has_tensor_cores", &ck::cuda::has_tensor_cores);
}
