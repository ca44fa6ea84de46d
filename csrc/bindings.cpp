// The Python module contrastive_kernels._C. A panel comes in as keywords, named in one table: integers all of them,
// where 0 is a null pointer.
#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>

#include "include/api.h"

namespace py = pybind11;

namespace {

template <typename T>
void assign(T*& member, py::handle value) {
  member = reinterpret_cast<T*>(value.cast<uintptr_t>());
}
template <typename T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
void assign(T& member, py::handle value) {
  member = value.cast<T>();
}
template <typename T, std::enable_if_t<std::is_enum_v<T>, int> = 0>
void assign(T& member, py::handle value) {
  member = static_cast<T>(value.cast<int>());
}

template <typename Panel>
using Fields = std::unordered_map<std::string, void (*)(Panel&, py::handle)>;

template <typename Panel, auto Member>
void set(Panel& panel, py::handle value) {
  assign(panel.*Member, value);
}
template <auto Side, auto Member>
void set_side(ck::Panel& panel, py::handle value) {
  assign(panel.*Side.*Member, value);
}

using P = ck::Panel;
using S = ck::Side;
using Q = ck::SearchPanel;

// Every member of a panel by its name.
template <typename Panel>
const Fields<Panel>& fields();

template <>
const Fields<P>& fields<P>() {
  static const Fields<P> table = {
      {"term", set<P, &P::term>},
      {"scores", set<P, &P::scores>},
      {"rows", set<P, &P::rows>},
      {"cols", set<P, &P::cols>},
      {"stride", set<P, &P::stride>},
      {"params", set<P, &P::params>},
      {"exclude", set<P, &P::exclude>},
      {"exclude_count", set<P, &P::exclude_count>},
      {"first_column", set<P, &P::first_column>},
      {"row_reference", set_side<&P::row, &S::reference>},
      {"row_sum", set_side<&P::row, &S::sum>},
      {"row_normalizer", set_side<&P::row, &S::normalizer>},
      {"row_gain", set_side<&P::row, &S::gain>},
      {"col_reference", set_side<&P::col, &S::reference>},
      {"col_sum", set_side<&P::col, &S::sum>},
      {"col_normalizer", set_side<&P::col, &S::normalizer>},
      {"col_gain", set_side<&P::col, &S::gain>},
      {"weights", set<P, &P::weights>},
      {"weights_dtype", set<P, &P::weights_dtype>},
      {"weights_stride", set<P, &P::weights_stride>},
      {"dparams", set<P, &P::dparams>},
      {"threads", set<P, &P::threads>},
      {"x", set<P, &P::x>},
      {"y", set<P, &P::y>},
      {"operands", set<P, &P::operands>},
      {"depth", set<P, &P::depth>},
      {"x_stride", set<P, &P::x_stride>},
      {"y_stride", set<P, &P::y_stride>},
      {"factor", set<P, &P::factor>},
      {"device", set<P, &P::device>},
      {"stream", set<P, &P::stream>},
      {"scratch", set<P, &P::scratch>},
      {"scratch_bytes", set<P, &P::scratch_bytes>},
  };
  return table;
}

template <>
const Fields<Q>& fields<Q>() {
  static const Fields<Q> table = {
      {"term", set<Q, &Q::term>},
      {"scores", set<Q, &Q::scores>},
      {"rows", set<Q, &Q::rows>},
      {"cols", set<Q, &Q::cols>},
      {"stride", set<Q, &Q::stride>},
      {"params", set<Q, &Q::params>},
      {"exclude", set<Q, &Q::exclude>},
      {"exclude_count", set<Q, &Q::exclude_count>},
      {"first_row", set<Q, &Q::first_row>},
      {"first_column", set<Q, &Q::first_column>},
      {"row_ids", set<Q, &Q::row_ids>},
      {"col_ids", set<Q, &Q::col_ids>},
      {"seed", set<Q, &Q::seed>},
      {"best", set<Q, &Q::best>},
      {"best_column", set<Q, &Q::best_column>},
      {"low", set<Q, &Q::low>},
      {"high", set<Q, &Q::high>},
      {"below", set<Q, &Q::below>},
      {"above", set<Q, &Q::above>},
      {"threads", set<Q, &Q::threads>},
  };
  return table;
}

template <typename Panel>
py::list names() {
  py::list all;
  for (const auto& field : fields<Panel>()) all.append(field.first);
  return all;
}

template <typename Panel>
Panel make_panel(const py::kwargs& arguments) {
  Panel panel;
  const Fields<Panel>& known = fields<Panel>();
  for (const std::pair<py::handle, py::handle> item : arguments) {
    const std::string name = py::cast<std::string>(item.first);
    const auto found = known.find(name);
    if (found == known.end()) throw py::type_error("a panel has no member " + name);
    found->second(panel, item.second);
  }
  return panel;
}

template <typename Panel, void (*Pass)(const Panel&)>
void run(const py::kwargs& arguments) {
  const Panel panel = make_panel<Panel>(arguments);
  py::gil_scoped_release release;
  Pass(panel);
}

void exp_array(uintptr_t x, uintptr_t out, int64_t n) {
  ck::exp_array(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), n);
}

void gumbel_array(int64_t seed, int64_t row, int64_t first_column, uintptr_t out, int64_t n) {
  ck::gumbel_array(seed, row, first_column, reinterpret_cast<float*>(out), n);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The pass over one panel of scores, on the CPU and in CUDA. A panel's members are keywords; see api.h.";
  m.attr("_panel_members") = names<P>();
  m.attr("_search_panel_members") = names<Q>();
  m.def("reduce_panel", &run<P, ck::reduce_panel>);
  m.def("weight_panel", &run<P, ck::weight_panel>);
  m.def("search_panel", &run<Q, ck::search_panel>);
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
