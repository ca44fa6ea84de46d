// The Python module contrastive_kernels._C. A panel comes in as keywords, named in members.h: integers all of them,
// where 0 is a null pointer.
#include <pybind11/pybind11.h>

#include <stdexcept>
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
using R = ck::Pairs;

// Every member of a panel, or of what is said of pairs, by its name.
template <typename Panel>
const Keywords<Panel>& keywords();

#define CK_OF_PANEL(type, name, initial, comment) {#name, {set<P, &P::name>, comment}},
#define CK_OF_SEARCH(type, name, initial, comment) {#name, {set<Q, &Q::name>, comment}},
#define CK_OF_PAIRS(type, name, initial, comment) {#name, {set<R, &R::name>, comment}},
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

template <>
const Keywords<R>& keywords<R>() {
  static const Keywords<R> table = {CK_PAIRS_MEMBERS(CK_OF_PAIRS)};
  return table;
}

// {keyword: comment}, for whoever looks for it in Python.
template <typename Panel>
py::dict comments() {
  py::dict all;
  for (const auto& keyword : keywords<Panel>()) all[py::str(std::string(keyword.first))] = keyword.second.comment;
  return all;
}

template <typename Owner>
Owner from_keywords(const py::dict& arguments) {
  Owner owner;
  const Keywords<Owner>& known = keywords<Owner>();
  for (const std::pair<py::handle, py::handle> item : arguments) {
    Py_ssize_t size = 0;
    const char* name = PyUnicode_AsUTF8AndSize(item.first.ptr(), &size);
    if (!name) throw py::error_already_set();
    const auto found = known.find(std::string_view(name, static_cast<size_t>(size)));
    if (found == known.end()) throw py::type_error("there is no member " + std::string(name));
    found->second.set(owner, item.second);
  }
  return owner;
}

template <typename Panel, void (*Pass)(const Panel&)>
void run(const py::kwargs& arguments) {
  const Panel panel = from_keywords<Panel>(arguments);
  py::gil_scoped_release release;
  Pass(panel);
}

// A matrix's arguments come by position, and are read one after the other: keywords, or pybind11's own conversions of
// so many arguments, take longer than a small matrix.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected) : next_(values) {
    if (count != expected)
      throw py::type_error("expected " + std::to_string(expected) + " arguments, got " + std::to_string(count));
  }

  template <typename T>
  void read(T& value) {
    assign(value, *next_++);
  }
  void read(float& value) { value = static_cast<float>(number()); }
  void read(double& value) { value = number(); }
  void read(bool& value) { value = PyObject_IsTrue(*next_++) != 0; }

  // Of the pairs, all but the diagonal, which most matrices have: {member: integer}, or None.
  void read_pairs(ck::Pairs& value) {
    const py::handle given = *next_++;
    if (!given.is_none()) value = from_keywords<ck::Pairs>(py::cast<py::dict>(given));
  }

  // None: no diagonal.
  void read_diagonal(int64_t& value) {
    value = *next_ == Py_None ? ck::kNoDiagonal : integer(*next_);
    ++next_;
  }

  void read_matrix(ck::Matrix& m) {
    read(m.scores), read(m.weights), read(m.positive_weights), read(m.rows), read(m.cols), read_pairs(m.pairs);
    read_diagonal(m.pairs.diagonal), read(m.positives), read_diagonal(m.offset), read(m.scale), read(m.bias);
  }

 private:
  double number() {
    const double value = PyFloat_AsDouble(*next_++);
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  PyObject* const* next_;
};

void softmax_matrix(PyObject* const* values, Py_ssize_t count, double* out) {
  Arguments arguments(values, count, 20);
  ck::Matrix m;
  bool both, symmetric, include;
  arguments.read_matrix(m);
  arguments.read(m.gain), arguments.read(m.share), arguments.read(both), arguments.read(symmetric);
  arguments.read(include), arguments.read(m.unscaled), arguments.read(m.lift), arguments.read(m.dlift);
  arguments.read(m.threads);
  m.out = out;
  py::gil_scoped_release release;
  ck::softmax_matrix(m, both, symmetric, include);
}

void label_matrix(PyObject* const* values, Py_ssize_t count, double* out) {
  Arguments arguments(values, count, 15);
  ck::Matrix m;
  float* share;
  bool symmetric;
  arguments.read_matrix(m);
  arguments.read(m.gain), arguments.read(share), arguments.read(symmetric), arguments.read(m.threads);
  m.out = out;
  py::gil_scoped_release release;
  ck::label_matrix(m, share, symmetric);
}

void weighted_matrix(PyObject* const* values, Py_ssize_t count, double* out) {
  Arguments arguments(values, count, 22);
  ck::PairTerm term;
  ck::Matrix m;
  ck::GivenSide row, col;
  bool relative;
  float* dots;
  arguments.read(term), arguments.read_matrix(m);
  arguments.read(row.normalizer), arguments.read(row.gain), arguments.read(col.normalizer), arguments.read(col.gain);
  arguments.read(m.share), arguments.read(relative), arguments.read(row.state), arguments.read(col.state);
  arguments.read(dots), arguments.read(m.threads);
  m.out = out;
  py::gil_scoped_release release;
  ck::weighted_matrix(m, term, row, col, relative, dots);
}

void read_operand(Arguments& arguments, ck::Operand& operand) {
  arguments.read(operand.data), arguments.read(operand.dtype);
  arguments.read(operand.line_stride), arguments.read(operand.depth_stride);
}

void multiply_bfloat16(PyObject* const* values, Py_ssize_t count, double*) {
  Arguments arguments(values, count, 20);
  ck::Product p;
  read_operand(arguments, p.x), read_operand(arguments, p.y);
  arguments.read(p.out), arguments.read(p.out_dtype), arguments.read(p.rows), arguments.read(p.cols);
  arguments.read(p.depth), arguments.read(p.stride), arguments.read(p.add), arguments.read(p.entries.values);
  arguments.read(p.entries.places), arguments.read(p.entries.offset), arguments.read(p.entries.turned);
  arguments.read(p.threads);
  py::gil_scoped_release release;
  ck::multiply_bfloat16(p);
}

// One of them as Python calls it, with its exceptions as pybind11 would tell them: value, d/dscale, d/dbias.
template <void (*Function)(PyObject* const*, Py_ssize_t, double*)>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
  double out[3] = {};
  try {
    Function(values, count, out);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const py::type_error& error) {
    error.set_error();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return Py_BuildValue("(ddd)", out[0], out[1], out[2]);
}

template <void (*Function)(PyObject* const*, Py_ssize_t, double*)>
void add(py::module_& m, const char* name) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call<Function>)),
                               METH_FASTCALL, nullptr};
  m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
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
  m.attr("_built_from") = py::make_tuple(ck::version(), ck::sources());
  m.attr("_panel_members") = comments<P>();
  m.attr("_search_panel_members") = comments<Q>();
  m.def("reduce_panel", &run<P, ck::reduce_panel>);
  m.def("weight_panel", &run<P, ck::weight_panel>);
  m.def("search_panel", &run<Q, ck::search_panel>);
  add<softmax_matrix>(m, "softmax_matrix");
  add<weighted_matrix>(m, "weighted_matrix");
  add<label_matrix>(m, "label_matrix");
  add<multiply_bfloat16>(m, "multiply_bfloat16");
  m.def("multiplies_bfloat16", &ck::multiplies_bfloat16);
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
