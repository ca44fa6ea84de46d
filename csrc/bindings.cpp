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

using Setter = void (*)(ck::Panel&, py::handle);

template <auto Member>
void set(ck::Panel& panel, py::handle value) {
  assign(panel.*Member, value);
}
template <auto Side, auto Member>
void set(ck::Panel& panel, py::handle value) {
  assign(panel.*Side.*Member, value);
}

using P = ck::Panel;
using S = ck::Side;

// Every member of a panel by its name.
const std::unordered_map<std::string, Setter>& fields() {
  static const std::unordered_map<std::string, Setter> table = {
      {"term", set<&P::term>},
      {"scores", set<&P::scores>},
      {"rows", set<&P::rows>},
      {"cols", set<&P::cols>},
      {"stride", set<&P::stride>},
      {"params", set<&P::params>},
      {"exclude", set<&P::exclude>},
      {"exclude_count", set<&P::exclude_count>},
      {"first_column", set<&P::first_column>},
      {"row_reference", set<&P::row, &S::reference>},
      {"row_sum", set<&P::row, &S::sum>},
      {"row_normalizer", set<&P::row, &S::normalizer>},
      {"row_gain", set<&P::row, &S::gain>},
      {"col_reference", set<&P::col, &S::reference>},
      {"col_sum", set<&P::col, &S::sum>},
      {"col_normalizer", set<&P::col, &S::normalizer>},
      {"col_gain", set<&P::col, &S::gain>},
      {"weights", set<&P::weights>},
      {"weights_dtype", set<&P::weights_dtype>},
      {"weights_stride", set<&P::weights_stride>},
      {"dparams", set<&P::dparams>},
      {"threads", set<&P::threads>},
      {"x", set<&P::x>},
      {"y", set<&P::y>},
      {"operands", set<&P::operands>},
      {"depth", set<&P::depth>},
      {"x_stride", set<&P::x_stride>},
      {"y_stride", set<&P::y_stride>},
      {"factor", set<&P::factor>},
      {"device", set<&P::device>},
      {"stream", set<&P::stream>},
      {"scratch", set<&P::scratch>},
      {"scratch_bytes", set<&P::scratch_bytes>},
  };
  return table;
}

ck::Panel make_panel(const py::kwargs& arguments) {
  ck::Panel panel;
  for (const auto& [key, value] : arguments) {
    const auto found = fields().find(key.cast<std::string>());
    if (found == fields().end()) throw py::type_error("a panel has no member " + key.cast<std::string>());
    found->second(panel, value);
  }
  return panel;
}

template <void (*Pass)(const ck::Panel&)>
void run(const py::kwargs& arguments) {
  const ck::Panel panel = make_panel(arguments);
  py::gil_scoped_release release;
  Pass(panel);
}

void exp_array(uintptr_t x, uintptr_t out, int64_t n) {
  ck::exp_array(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), n);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The pass over one panel of scores, on the CPU and in CUDA. A panel's members are keywords; see api.h.";
  py::list members;
  for (const auto& field : fields()) members.append(field.first);
  m.attr("_panel_members") = members;
  m.def("reduce_panel", &run<ck::reduce_panel>);
  m.def("weight_panel", &run<ck::weight_panel>);
  m.def("exp_array", &exp_array);
  m.def("instruction_set", &ck::instruction_set);
  m.def("set_instruction_set", &ck::set_instruction_set);
  m.def("cuda_reduce_panel", &run<ck::cuda::reduce_panel>);
  m.def("cuda_weight_panel", &run<ck::cuda::weight_panel>);
  m.def("cuda_scratch_bytes", &ck::cuda::scratch_bytes);
  m.def("cuda_version", &ck::cuda::version);
  m.def("cuda_architectures", &ck::cuda::architectures);
  m.def("cuda_why_not", &ck::cuda::why_not);
  m.def("cuda_has_tensor_cores", &ck::cuda::has_tensor_cores);
}
