/* module.cpp - the Python module zo_kernels._C: the only file that knows Python.
 *
 * Belongs here: turning Python numbers into the structs of zo_kernels.h, and error codes into exceptions; looks at
 * hundreds of Python objects a forward, which in Python cost more than a small model's passes. Does not belong here:
 * torch (tensors arrive as addresses, or as objects like any other), checks of a user's arguments
 * (zo_kernels/checks.py), work.
 *
 * Addresses are Python ints. `table` is the address of n structs zo_tensor, that is a C-contiguous uint64 matrix [n,
 * 14] in host memory, which the caller keeps alive during the call.
 */
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stddef.h>
#include <string>
#include <utility>
#include <vector>

#include "rules.h"
#include "zo_kernels.h"

namespace py = pybind11;

/* zo_kernels/plan.py (Entry.record) writes these words one by one. */
static_assert(sizeof(zo_tensor) == 112 && offsetof(zo_tensor, numel) == 16 && offsetof(zo_tensor, scale_block) == 48 &&
                  offsetof(zo_tensor, row_len) == 64 && offsetof(zo_tensor, stream) == 72 &&
                  offsetof(zo_tensor, keep) == 76 && offsetof(zo_tensor, mask_tag) == 80 &&
                  offsetof(zo_tensor, rank) == 84 && offsetof(zo_tensor, rsqrt) == 86 &&
                  offsetof(zo_tensor, left) == 88 && offsetof(zo_tensor, cols) == 104,
              "zo_tensor is not a row of 14 words");

namespace {

/* A zo_pass from Python arguments, with the memory of its terms where it owns them. Used by every backend of this
 * module.
 *
 *   tags, coefs   two lists of numbers (n_terms is then their length and the argument is ignored), or two addresses of
 * n_terms int64 and fp32 in the memory of the tensors' device decay         None, a float, or (int) the address of one
 * fp32 in that memory
 *
 * With lists, the struct points nowhere up to ZO_INLINE_TERMS terms; beyond, at host memory of this object. */
struct Pass {
  zo_pass c = {};
  std::vector<int64_t> tags;
  std::vector<float> coefs;

  Pass(uint64_t seed, int dtype, int kind, int rounding, py::handle tags_, py::handle coefs_, int64_t n_terms,
       py::handle decay) {
    c.seed = seed, c.dtype = dtype, c.kind = kind, c.rounding = rounding, c.n_terms = n_terms;
    if (PyLong_Check(tags_.ptr())) {
      c.tags = address<const int64_t>(tags_);
      c.coefs = address<const float>(coefs_);
    } else {
      take_lists(tags_, coefs_);
    }
    c.has_decay = !decay.is_none();
    if (PyLong_Check(decay.ptr())) {
      c.decay_ptr = address<const float>(decay);
    } else if (c.has_decay) {
      c.decay = (float)number(decay);
    }
  }

  Pass(const Pass &) = delete; /* c may point into this object */

  template <class T> static T *address(py::handle h) { return (T *)(uintptr_t)h.cast<uint64_t>(); }

  static void copy(py::handle list, float *to, int64_t most, const char *error) {
    if (!PyList_Check(list.ptr())) throw py::type_error("numbers and squares must be lists or addresses (ints)");
    const int64_t n = PyList_GET_SIZE(list.ptr());
    if (n > most) throw py::value_error(error);
    for (int64_t k = 0; k < n; ++k) to[k] = (float)number(PyList_GET_ITEM(list.ptr(), k));
  }

private:
  static double number(py::handle h) {
    const double x = PyFloat_AsDouble(h.ptr());
    if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return x;
  }

  static int64_t tag(py::handle h) {
    const long long x = PyLong_AsLongLong(h.ptr());
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    return x;
  }

  void take_lists(py::handle tags_, py::handle coefs_) {
    if (!PyList_Check(tags_.ptr()) || !PyList_Check(coefs_.ptr())) {
      throw py::type_error("tags and coefs must be two lists, or two addresses (ints)");
    }
    PyObject *const t = tags_.ptr(), *const f = coefs_.ptr();
    const int64_t n = PyList_GET_SIZE(t);
    if (PyList_GET_SIZE(f) != n) throw py::value_error("tags and coefs differ in length");
    c.n_terms = n;
    if (n > ZO_INLINE_TERMS) {
      tags.resize((size_t)n), coefs.resize((size_t)n);
      c.tags = tags.data(), c.coefs = coefs.data();
    }
    for (int64_t k = 0; k < n; ++k) {
      const int64_t a = tag(PyList_GET_ITEM(t, k));
      const float x = (float)number(PyList_GET_ITEM(f, k));
      if (n > ZO_INLINE_TERMS) {
        tags[(size_t)k] = a, coefs[(size_t)k] = x;
      } else {
        c.inline_tags[k] = (uint32_t)a, c.inline_coefs[k] = x;
      }
    }
  }
};

/* A zo_pass of a sequence; every argument but the numbers is an address in the memory of the tensors' device. */
zo_pass sequence(uint64_t seed, int dtype, int kind, uint64_t tags, uint64_t coefs, int64_t n_terms, uint64_t first,
                 uint64_t decays, uint64_t roundings, int64_t n_passes) {
  zo_pass c = {};
  c.seed = seed, c.dtype = dtype, c.kind = kind, c.n_terms = n_terms, c.n_passes = n_passes;
  c.tags = (const int64_t *)(uintptr_t)tags;
  c.coefs = (const float *)(uintptr_t)coefs;
  c.first = (const int64_t *)(uintptr_t)first;
  c.decays = (const float *)(uintptr_t)decays;
  c.roundings = (const uint8_t *)(uintptr_t)roundings;
  return c;
}

void check(int code) {
  if (code) throw std::runtime_error(std::string("zo_kernels: ") + zo_error_string(code));
}

void cpu_perturb(uint64_t table, int64_t n, uint64_t seed, int dtype, int kind, int rounding, py::handle tags,
                 py::handle coefs, int64_t n_terms, py::handle decay, int threads, int isa) {
  const Pass pass(seed, dtype, kind, rounding, tags, coefs, n_terms, decay);
  int code;
  {
    py::gil_scoped_release release;
    code = zo_cpu_perturb(&pass.c, (const zo_tensor *)(uintptr_t)table, n, threads, isa);
  }
  check(code);
}

void cpu_sequence(uint64_t table, int64_t n, uint64_t seed, int dtype, int kind, uint64_t tags, uint64_t coefs,
                  int64_t n_terms, uint64_t first, uint64_t decays, uint64_t roundings, int64_t n_passes, int threads,
                  int isa) {
  const zo_pass pass = sequence(seed, dtype, kind, tags, coefs, n_terms, first, decays, roundings, n_passes);
  int code;
  {
    py::gil_scoped_release release;
    code = zo_cpu_perturb(&pass, (const zo_tensor *)(uintptr_t)table, n, threads, isa);
  }
  check(code);
}

/* `numbers` and `squares` of a zo_update: lists go into the struct, addresses are pointed at. */
void fill(zo_update &u, py::handle numbers, py::handle squares) {
  if (PyLong_Check(numbers.ptr())) {
    u.number_ptr = Pass::address<const float>(numbers);
  } else {
    Pass::copy(numbers, u.numbers, ZO_RULE_NUMBERS, "more than 9 numbers");
  }
  if (PyLong_Check(squares.ptr())) {
    u.squares = Pass::address<const float>(squares);
  } else if (!squares.is_none()) {
    Pass::copy(squares, u.inline_squares, ZO_INLINE_TERMS, "more than INLINE_TERMS squares: put them into memory");
  }
}

void cpu_update(uint64_t table, uint64_t states, int64_t n, uint64_t seed, int dtype, int kind, int rounding, int rule,
                int state_dtype, py::handle tags, py::handle coefs, int64_t n_terms, py::handle numbers,
                py::handle squares, int threads, int isa) {
  const Pass pass(seed, dtype, kind, rounding, tags, coefs, n_terms, py::none());
  zo_update update = {};
  update.pass = pass.c;
  update.rule = rule, update.state_dtype = state_dtype;
  fill(update, numbers, squares);
  int code;
  {
    py::gil_scoped_release release;
    code = zo_cpu_update(&update, (const zo_tensor *)(uintptr_t)table, (const zo_states *)(uintptr_t)states, n, threads,
                         isa);
  }
  check(code);
}

void cpu_magnitude_mask(uint64_t table, uint64_t limits, int64_t n, int dtype, int threads, int isa) {
  int code;
  {
    py::gil_scoped_release release;
    code = zo_cpu_magnitude_mask(dtype, (const zo_tensor *)(uintptr_t)table, (const float *)(uintptr_t)limits, n,
                                 threads, isa);
  }
  check(code);
}

#ifdef ZO_WITH_CUDA
/* A launch blocks while the stream's queue is full, and other threads go on meanwhile. */
template <typename Launch> void launch_cuda(Launch launch) {
  int code;
  {
    py::gil_scoped_release release;
    code = launch();
  }
  if (code) throw std::runtime_error(std::string("zo_kernels: CUDA launch: ") + zo_cuda_error_string(code));
}

std::string cuda_status() {
  const int code = zo_cuda_status();
  return code ? zo_cuda_error_string(code) : "";
}

void cuda_perturb(uint64_t table, uint64_t map, int64_t tiles, int64_t tile, int form, uint64_t seed, int dtype,
                  int kind, int rounding, py::handle tags, py::handle coefs, int64_t n_terms, py::handle decay,
                  uint64_t stream) {
  const Pass pass(seed, dtype, kind, rounding, tags, coefs, n_terms, decay);
  if (!pass.tags.empty()) throw py::value_error("more than INLINE_TERMS numbers: put them into device memory");
  launch_cuda([&] {
    return zo_cuda_perturb(&pass.c, (const zo_tensor *)(uintptr_t)table, (const uint32_t *)(uintptr_t)map, tiles, tile,
                           form, (void *)(uintptr_t)stream);
  });
}

void cuda_sequence(uint64_t table, uint64_t map, int64_t tiles, int64_t tile, int form, uint64_t seed, int dtype,
                   int kind, uint64_t tags, uint64_t coefs, int64_t n_terms, uint64_t first, uint64_t decays,
                   uint64_t roundings, int64_t n_passes, uint64_t scratch, uint64_t stream) {
  zo_pass pass = sequence(seed, dtype, kind, tags, coefs, n_terms, first, decays, roundings, n_passes);
  pass.scratch = (void *)(uintptr_t)scratch;
  launch_cuda([&] {
    return zo_cuda_perturb(&pass, (const zo_tensor *)(uintptr_t)table, (const uint32_t *)(uintptr_t)map, tiles, tile,
                           form, (void *)(uintptr_t)stream);
  });
}

void cuda_update(uint64_t table, uint64_t map, int64_t tiles, int64_t tile, uint64_t states, uint64_t seed, int dtype,
                 int kind, int rounding, int rule, int state_dtype, py::handle tags, py::handle coefs, int64_t n_terms,
                 py::handle numbers, py::handle squares, uint64_t stream) {
  const Pass pass(seed, dtype, kind, rounding, tags, coefs, n_terms, py::none());
  if (!pass.tags.empty()) throw py::value_error("more than INLINE_TERMS numbers: put them into device memory");
  zo_update update = {};
  update.pass = pass.c;
  update.rule = rule, update.state_dtype = state_dtype;
  fill(update, numbers, squares);
  launch_cuda([&] {
    return zo_cuda_update(&update, (const zo_tensor *)(uintptr_t)table, (const zo_states *)(uintptr_t)states,
                          (const uint32_t *)(uintptr_t)map, tiles, tile, (void *)(uintptr_t)stream);
  });
}

void cuda_magnitude_mask(uint64_t table, uint64_t map, int64_t tiles, int64_t tile, uint64_t limits, int dtype,
                         uint64_t stream) {
  launch_cuda([&] {
    return zo_cuda_magnitude_mask(dtype, (const zo_tensor *)(uintptr_t)table, (const float *)(uintptr_t)limits,
                                  (const uint32_t *)(uintptr_t)map, tiles, tile, (void *)(uintptr_t)stream);
  });
}
#endif

/* One attribute of objects of a class, asked for by its descriptor: a field, or a method without arguments. Both are
 * one call where they are C's own. */
struct Attribute {
  PyObject *descriptor;
  getter get = nullptr;
  void *closure = nullptr;
  PyCFunction method = nullptr;
  PyCFunctionWithKeywords parsed = nullptr; /* a method that reads its arguments, of which there are none */
  py::tuple nothing;

  explicit Attribute(PyObject *d) : descriptor(d) {
    if (Py_TYPE(d) == &PyGetSetDescr_Type) {
      get = ((PyGetSetDescrObject *)d)->d_getset->get;
      closure = ((PyGetSetDescrObject *)d)->d_getset->closure;
    } else if (Py_TYPE(d) == &PyMethodDescr_Type && ((PyMethodDescrObject *)d)->d_method->ml_flags == METH_NOARGS) {
      method = ((PyMethodDescrObject *)d)->d_method->ml_meth;
    } else if (Py_TYPE(d) == &PyMethodDescr_Type &&
               ((PyMethodDescrObject *)d)->d_method->ml_flags == (METH_VARARGS | METH_KEYWORDS)) {
      parsed = (PyCFunctionWithKeywords)(void (*)(void))((PyMethodDescrObject *)d)->d_method->ml_meth;
    }
  }

  py::object of(PyObject *o) const {
    if ((get || method || parsed) && !PyObject_TypeCheck(o, PyDescr_TYPE(descriptor)))
      throw py::type_error("not of the descriptor's class");
    PyObject *const found = get      ? get(o, closure)
                            : method ? method(o, nullptr)
                            : parsed ? parsed(o, nothing.ptr(), nullptr)
                                     : PyObject_CallFunctionObjArgs(descriptor, o, nullptr);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
};

py::ssize_t first_change(py::list objects, py::tuple attributes, py::tuple before) {
  std::vector<Attribute> asked;
  for (py::handle d : attributes) asked.emplace_back(d.ptr());
  if (before.size() != asked.size()) throw py::value_error("as many columns as attributes");
  for (size_t i = 0; i < objects.size(); ++i) {
    for (size_t k = 0; k < asked.size(); ++k) {
      const py::object now = asked[k].of(PyList_GET_ITEM(objects.ptr(), (Py_ssize_t)i));
      PyObject *const then = PyList_GetItem(PyTuple_GET_ITEM(before.ptr(), (Py_ssize_t)k), (Py_ssize_t)i);
      if (!then) throw py::error_already_set();
      if (now.ptr() == then) continue;
      const int same = PyObject_RichCompareBool(now.ptr(), then, Py_EQ);
      if (same < 0) throw py::error_already_set();
      if (!same) return (py::ssize_t)i;
    }
  }
  return -1;
}

py::ssize_t first_replaced(py::list owners, py::str table, py::list names, py::list values) {
  const size_t n = owners.size();
  if (names.size() != n || values.size() != n) throw py::value_error("as many names and values as owners");
  for (size_t i = 0; i < n; ++i) {
    PyObject *const owner = PyList_GET_ITEM(owners.ptr(), (Py_ssize_t)i);
    const py::object own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(owner, nullptr));
    if (!own) throw py::error_already_set();
    py::object there = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(own.ptr(), table.ptr()));
    if (!there) there = py::reinterpret_borrow<py::object>(owner).attr(table);
    if (!PyDict_Check(there.ptr())) return (py::ssize_t)i;
    PyObject *const found = PyDict_GetItemWithError(there.ptr(), PyList_GET_ITEM(names.ptr(), (Py_ssize_t)i));
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if (found != PyList_GET_ITEM(values.ptr(), (Py_ssize_t)i)) return (py::ssize_t)i;
  }
  return -1;
}

/* The names of an enum, each at the place that is its value. */
using Names = std::initializer_list<std::pair<int, const char *>>;

py::tuple in_order(Names names) {
  py::tuple result(names.size());
  for (const auto &[value, name] : names) result[(size_t)value] = name;
  return result;
}

/* (name, numbers, states) of every rule. */
py::tuple rules(Names names) {
  py::tuple result(names.size());
  for (const auto &[value, name] : names) {
    result[(size_t)value] = py::make_tuple(name, zo::count_of_numbers(value), zo::count_of_states(value));
  }
  return result;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels; use zo_kernels.perturb_, which checks its arguments.";
  /* What zo_kernels/_backends/_extension.py compares with its own, and the functions' names and arguments. */
  m.attr("TENSOR_WORDS") = sizeof(zo_tensor) / 8;
  m.attr("STATE_WORDS") = sizeof(zo_states) / 8;
  m.attr("INLINE_TERMS") = ZO_INLINE_TERMS;
  m.attr("MAX_RANK") = ZO_MAX_RANK;
  m.attr("DTYPES") = in_order({{ZO_F32, "float32"}, {ZO_F16, "float16"}, {ZO_BF16, "bfloat16"}});
  m.attr("KINDS") = in_order({{ZO_GAUSSIAN, "gaussian"}, {ZO_RADEMACHER, "rademacher"}});
  m.attr("ROUNDINGS") = in_order({{ZO_NEAREST, "nearest"}, {ZO_STOCHASTIC, "stochastic"}});
  m.attr("RULES") =
      rules({{ZO_MOMENTUM, "momentum"}, {ZO_ADAM, "adam"}, {ZO_HIZOO, "hizoo"}, {ZO_ADAM_HISTORY, "adam_history"}});

  /* ---- looks ---- */
  m.def(
      "first_change", &first_change, py::arg("objects"), py::arg("attributes"), py::arg("before"),
      "The place of the first of the objects one of whose attributes, given by their descriptors, is not equal to that "
      "in `before`, a list for each attribute; -1: there is none.");
  m.def("first_replaced", &first_replaced, py::arg("owners"), py::arg("table"), py::arg("names"), py::arg("values"),
        "The place of the first of the owners whose dict of this name has something else than the value under the name "
        "at that place; -1: there is none.");

  /* ---- CPU ---- */
  m.attr("ISA_NAMES") = py::make_tuple("best", "portable", "avx2", "avx512"); /* in the order of the argument `isa` */
  m.def("cpu_best_isa", &zo_cpu_best_isa,
        "Index into ISA_NAMES of the best instruction set of this processor and build.");
  m.def("cpu_perturb", &cpu_perturb, py::arg("table"), py::arg("n"), py::arg("seed"), py::arg("dtype"), py::arg("kind"),
        py::arg("rounding"), py::arg("tags"), py::arg("coefs"), py::arg("n_terms"), py::arg("decay"),
        py::arg("threads"), py::arg("isa"),
        "zo_cpu_perturb of csrc/zo_kernels.h; tags and coefs are two lists, or addresses of n_terms values.");
  m.def("cpu_sequence", &cpu_sequence, py::arg("table"), py::arg("n"), py::arg("seed"), py::arg("dtype"),
        py::arg("kind"), py::arg("tags"), py::arg("coefs"), py::arg("n_terms"), py::arg("first"), py::arg("decays"),
        py::arg("roundings"), py::arg("n_passes"), py::arg("threads"), py::arg("isa"),
        "zo_cpu_perturb for a sequence of passes; tags .. roundings are addresses.");
  m.def("cpu_update", &cpu_update, py::arg("table"), py::arg("states"), py::arg("n"), py::arg("seed"), py::arg("dtype"),
        py::arg("kind"), py::arg("rounding"), py::arg("rule"), py::arg("state_dtype"), py::arg("tags"),
        py::arg("coefs"), py::arg("n_terms"), py::arg("numbers"), py::arg("squares"), py::arg("threads"),
        py::arg("isa"),
        "zo_cpu_update of csrc/zo_kernels.h; states is the address of n structs zo_states; numbers and squares are "
        "lists or addresses (squares may be None).");

  m.def("cpu_magnitude_mask", &cpu_magnitude_mask, py::arg("table"), py::arg("limits"), py::arg("n"), py::arg("dtype"),
        py::arg("threads"), py::arg("isa"),
        "zo_cpu_magnitude_mask of csrc/zo_kernels.h; limits is the address of n floats.");

  /* ---- CUDA ---- */
#ifdef ZO_WITH_CUDA
  m.attr("WITH_CUDA") = true;
  m.def(
      "cuda_perturb", &cuda_perturb, py::arg("table"), py::arg("map"), py::arg("tiles"), py::arg("tile"),
      py::arg("form"), py::arg("seed"), py::arg("dtype"), py::arg("kind"), py::arg("rounding"), py::arg("tags"),
      py::arg("coefs"), py::arg("n_terms"), py::arg("decay"), py::arg("stream"),
      "zo_cuda_perturb of csrc/zo_kernels.h; table and map are addresses in device memory, stream a cudaStream_t; tags "
      "and coefs are two lists of at most INLINE_TERMS numbers, or addresses of n_terms values in device memory.");
  m.def("cuda_sequence", &cuda_sequence, py::arg("table"), py::arg("map"), py::arg("tiles"), py::arg("tile"),
        py::arg("form"), py::arg("seed"), py::arg("dtype"), py::arg("kind"), py::arg("tags"), py::arg("coefs"),
        py::arg("n_terms"), py::arg("first"), py::arg("decays"), py::arg("roundings"), py::arg("n_passes"),
        py::arg("scratch"), py::arg("stream"),
        "zo_cuda_perturb for a sequence of passes; tags .. roundings and scratch are addresses in device memory.");
  m.def("cuda_update", &cuda_update, py::arg("table"), py::arg("map"), py::arg("tiles"), py::arg("tile"),
        py::arg("states"), py::arg("seed"), py::arg("dtype"), py::arg("kind"), py::arg("rounding"), py::arg("rule"),
        py::arg("state_dtype"), py::arg("tags"), py::arg("coefs"), py::arg("n_terms"), py::arg("numbers"),
        py::arg("squares"), py::arg("stream"),
        "zo_cuda_update of csrc/zo_kernels.h; states is an address in device memory; numbers and squares are lists or "
        "such addresses (squares may be None); the rest as in cuda_perturb.");
  m.def("cuda_magnitude_mask", &cuda_magnitude_mask, py::arg("table"), py::arg("map"), py::arg("tiles"),
        py::arg("tile"), py::arg("limits"), py::arg("dtype"), py::arg("stream"),
        "zo_cuda_magnitude_mask; limits is an address in device memory.");
  m.def("cuda_status", &cuda_status, "Why the runtime finds no device; empty where it does.");
#else
  m.attr("WITH_CUDA") = false;
#endif
}
