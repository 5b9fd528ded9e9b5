#include "fast_path.h"

#include <cmath>
#include <stdexcept>
#include <vector>

#include "arguments.h"

namespace py = pybind11;

namespace se::fast_path {
namespace {

// The parts of DLPack's C exchange (dlpack.h, 1.3) that are used here. Every torch from 2.10 to 2.14 has it, as an
// attribute of the tensor type.
constexpr uint32_t kMajor = 1;
enum : int32_t { kCpu = 1 };
enum : uint8_t { kFloat = 2, kBfloat = 4 };
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct DlpackExchange {
  uint32_t major, minor;
  DlpackExchange* previous;
  void (*unused[3])();
  int (*to_dltensor)(void* object, DlTensor* out);  // `out` borrows from the object; does not wait for a stream
};

int (*to_dltensor)(void*, DlTensor*) = nullptr;

bool find_exchange(py::handle type) {
  const auto capsule =
      py::reinterpret_steal<py::object>(PyObject_GetAttrString(type.ptr(), "__dlpack_c_exchange_api__"));
  const void* table = capsule ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api") : nullptr;
  if (!table) PyErr_Clear();
  const auto* exchange = static_cast<const DlpackExchange*>(table);
  to_dltensor = exchange && exchange->major == kMajor ? exchange->to_dltensor : nullptr;
  return to_dltensor != nullptr;
}

bool read_dltensor(PyObject* object, View& out) {
  DlTensor t;
  if (to_dltensor(object, &t) != 0) return false;
  if (t.device_type != kCpu || t.lanes != 1) return false;
  if (t.code == kFloat && t.bits == 32) {
    out.dtype = DType::kFloat32;
  } else if (t.code == kFloat && t.bits == 64) {
    out.dtype = DType::kFloat64;
  } else if (t.code == kFloat && t.bits == 16) {
    out.dtype = DType::kFloat16;
  } else if (t.code == kBfloat && t.bits == 16) {
    out.dtype = DType::kBFloat16;
  } else {
    return false;
  }
  out.dim = t.dim, out.sizes = t.sizes, out.strides = t.strides;
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  return t.data != nullptr;
}

void (*run)(const BlockForward*) = nullptr;
std::vector<PyTypeObject*> plain_types;  // torch keeps the types and the functions alive
PyObject *empty_like = nullptr, *is_neg = nullptr, *storage_offset = nullptr, *untyped_storage = nullptr;

bool is_zero(PyObject* number) { return number && PyLong_Check(number) && PyLong_AsLongLong(number) == 0; }

// A view whose storage was freed still has a non-null address, unlike a tensor at the start of the storage.
bool has_storage(py::handle tensor) {
  const auto start = py::reinterpret_steal<py::object>(PyObject_CallOneArg(storage_offset, tensor.ptr()));
  if (is_zero(start.ptr())) return true;
  const auto storage = py::reinterpret_steal<py::object>(PyObject_CallOneArg(untyped_storage, tensor.ptr()));
  return storage && !storage.attr("nbytes")().equal(py::int_(0));
}

// Fails for a subclass of Tensor, which may redefine operators, and for a lazily negated tensor, which DLPack does not
// mark.
bool view(py::handle object, View& out) {
  if (object.is_none()) return true;
  bool is_plain = false;
  for (const PyTypeObject* type : plain_types) is_plain |= Py_TYPE(object.ptr()) == type;
  if (!is_plain) return false;
  PyObject* negative = PyObject_CallOneArg(is_neg, object.ptr());
  const bool is_not_negated = negative == Py_False;
  Py_XDECREF(negative);
  return is_not_negated && has_storage(object) && read_dltensor(object.ptr(), out);
}

}  // namespace

bool connect(uintptr_t forward, const py::tuple& types, py::object empty) {
  plain_types.clear();
  for (const py::handle type : types) plain_types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  auto keep = [](PyObject*& place, py::object function) {
    Py_XDECREF(place);
    place = function.release().ptr();
  };
  keep(empty_like, std::move(empty));
  keep(is_neg, types[0].attr("is_neg"));
  keep(storage_offset, types[0].attr("storage_offset"));
  keep(untyped_storage, types[0].attr("untyped_storage"));
  run = find_exchange(types[0]) ? reinterpret_cast<void (*)(const BlockForward*)>(forward) : nullptr;
  return run != nullptr;
}

py::object forward(py::handle x, py::handle w1, py::handle b1, py::handle w2, py::handle b2, py::handle residual,
                   bool inplace, int64_t act, int64_t gate, double slope, double offset, int64_t squeeze,
                   int64_t pre_act, int64_t post_act, py::handle scale, py::handle shift, py::handle s) {
  Inputs in;
  View scale_view, shift_view, s_view;
  if (!run || !view(x, in.x) || !view(w1, in.w1) || !view(b1, in.b1) || !view(w2, in.w2) || !view(b2, in.b2) ||
      !view(residual, in.residual) || !view(scale, scale_view) || !view(shift, shift_view) || !view(s, s_view)) {
    PyErr_Clear();
    return py::none();
  }
  if (in.x.dim < 3) return py::none();
  const bool channels_last = !is_dense(in.x);
  if (channels_last && !is_dense(in.x, true)) return py::none();
  BlockForward f{};
  py::object y;
  try {
    fill_problem(f, in, {act, gate, slope, offset, squeeze, pre_act, post_act}, channels_last);
    const DType dtype = accumulator_dtype(f);
    require(static_cast<bool>(scale_view) == static_cast<bool>(shift_view), "scale without shift, or shift without it");
    f.scale = weight_data("scale", scale_view, f.c, 0, dtype);
    f.shift = weight_data("shift", shift_view, f.c, 0, dtype);
    f.s = const_cast<void*>(weight_data("s", s_view, f.n, f.c, dtype));
    y = inplace ? py::reinterpret_borrow<py::object>(x) : py::handle(empty_like)(x);
    View out;
    if (!view(y, out)) {
      PyErr_Clear();
      return py::none();
    }
    f.y = y_data(out, in, channels_last);
  } catch (const std::runtime_error&) {
    return py::none();  // an error, or inputs that need a conversion: the dispatcher path reports or converts them
  }
  const py::gil_scoped_release without_gil;
  run(&f);
  return y;
}

namespace {

template <class A>
void fold_statistics(int64_t c, const void* weight, const void* bias, const void* mean, const void* variance,
                     const void* convolution_bias, double epsilon, void* out) {
  auto at = [](const void* values, int64_t i, A otherwise) {
    return values ? static_cast<const A*>(values)[i] : otherwise;
  };
  A* const scale = static_cast<A*>(out);
  for (int64_t i = 0; i < c; ++i) {
    scale[i] = at(weight, i, 1) / std::sqrt(at(variance, i, 1) + static_cast<A>(epsilon));
    scale[c + i] = at(bias, i, 0) + (at(convolution_bias, i, 0) - at(mean, i, 0)) * scale[i];
  }
}

}  // namespace

bool batch_norm(py::handle weight, py::handle bias, py::handle mean, py::handle variance, py::handle convolution_bias,
                double epsilon, py::handle out) {
  View w, b, m, v, k, o;
  if (!view(weight, w) || !view(bias, b) || !view(mean, m) || !view(variance, v) || !view(convolution_bias, k) ||
      !view(out, o)) {
    PyErr_Clear();
    return false;
  }
  if (o.dim != 2 || o.sizes[0] != 2 || (o.dtype != DType::kFloat32 && o.dtype != DType::kFloat64)) return false;
  const int64_t c = o.sizes[1];
  try {
    require(m.dim == 1 && v.dim == 1, "no statistics");
    auto data = [&](const View& t) { return weight_data("a vector", t, c, 0, o.dtype); };
    (o.dtype == DType::kFloat64 ? fold_statistics<double> : fold_statistics<float>)(c, data(w), data(b), data(m),
                                                                                    data(v), data(k), epsilon, o.data);
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}

}  // namespace se::fast_path
