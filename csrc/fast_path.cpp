#include "fast_path.h"

#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"

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

struct {
  void (*forward)(const BlockForward*) = nullptr;
  void (*batch_norm)(const BatchNorm*) = nullptr;
} run;
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

bool is_plain(const PyObject* object) {
  for (const PyTypeObject* type : plain_types) {
    if (Py_TYPE(object) == type) return true;
  }
  return false;
}

// Fails for a subclass of Tensor, which may redefine operators, and for a lazily negated tensor, which DLPack does not
// mark.
bool view(py::handle object, View& out) {
  if (object.is_none()) return true;
  if (!is_plain(object.ptr())) return false;
  PyObject* negative = PyObject_CallOneArg(is_neg, object.ptr());
  const bool is_not_negated = negative == Py_False;
  Py_XDECREF(negative);
  return is_not_negated && has_storage(object) && read_dltensor(object.ptr(), out);
}

}  // namespace

bool connect(uintptr_t forward, uintptr_t batch_norm, const py::tuple& types, py::object empty) {
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
  run = {};
  if (!find_exchange(types[0])) return false;
  run.forward = reinterpret_cast<void (*)(const BlockForward*)>(forward);
  run.batch_norm = reinterpret_cast<void (*)(const BatchNorm*)>(batch_norm);
  return true;
}

namespace {

// A batch norm: the tuple (weight, bias, mean, variance, epsilon), whose weight and bias may be None. False for tensors
// that must take another way.
struct NormViews {
  View weight, bias, mean, variance;
  double epsilon = 0;
  bool read(const py::tuple& norm) {
    epsilon = norm[4].cast<double>();
    return view(norm[0], weight) && view(norm[1], bias) && view(norm[2], mean) && view(norm[3], variance);
  }
};

// The elements of `t` [C], of `dtype`, in type A; `otherwise` for no tensor.
template <class A>
std::vector<A> elements(const char* name, const View& t, int64_t c, DType dtype, A otherwise) {
  std::vector<A> out(c, otherwise);
  if (const void* data = weight_data(name, t, c, 0, dtype)) {
    cpu::with_weight_type<A>(dtype, [&](auto type) {
      for (int64_t i = 0; i < c; ++i) out[i] = cpu::load<A>(static_cast<const decltype(type)*>(data) + i);
    });
  }
  return out;
}

// An eval-mode batch norm of C channels as one product and one sum, in the accumulation type of maps of `dtype`.
class Affine {
 public:
  Affine(const NormViews& norm, int64_t c, DType dtype) {
    require(norm.mean && norm.variance, "a batch norm without statistics");
    require(norm.mean.dtype == dtype || (element_bytes(dtype) == 2 && norm.mean.dtype == DType::kFloat32),
            "a batch norm of another dtype than its map");
    dtype == DType::kFloat64 ? fill<double>(norm, c) : fill<float>(norm, c);
  }
  const void *scale, *shift;

 private:
  template <class A>
  void fill(const NormViews& norm, int64_t c) {
    const DType dtype = norm.mean.dtype;
    const std::vector<A> weight = elements<A>("weight", norm.weight, c, dtype, 1);
    const std::vector<A> bias = elements<A>("bias", norm.bias, c, dtype, 0);
    const std::vector<A> mean = elements<A>("mean", norm.mean, c, dtype, 0);
    const std::vector<A> variance = elements<A>("variance", norm.variance, c, dtype, 1);
    memory_ = std::make_unique<char[]>(2 * c * sizeof(A));
    A *const k = reinterpret_cast<A*>(memory_.get()), *const b = k + c;
    for (int64_t i = 0; i < c; ++i) {
      k[i] = weight[i] / std::sqrt(variance[i] + static_cast<A>(norm.epsilon));
      b[i] = bias[i] - mean[i] * k[i];
    }
    scale = k, shift = b;
  }
  std::unique_ptr<char[]> memory_;
};

template <class A>
void fold_rows(const View& weight, const View& bias, const Affine& affine, const View& folded, const View& shift) {
  const int64_t rows = weight.sizes[0], columns = weight.numel() / rows;
  const auto* const scale = static_cast<const A*>(affine.scale);
  const auto* const w = static_cast<const A*>(weight.data);
  const std::vector<A> b = elements<A>("bias", bias, rows, weight.dtype, 0);
  auto* const out = static_cast<A*>(folded.data);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = w[i * columns + j] * scale[i];
    static_cast<A*>(shift.data)[i] = b[i] * scale[i] + static_cast<const A*>(affine.shift)[i];
  }
}

// A tensor that was just made.
View view_of(const py::object& tensor) {
  View out;
  if (!view(tensor, out)) {
    PyErr_Clear();
    require(false, "a tensor whose memory cannot be found");
  }
  return out;
}

py::object new_like(py::handle x) { return py::handle(empty_like)(x); }

// Runs `compute`, which returns a Python object. None if it throws: for an error, or inputs that need a conversion. The
// way around reports or converts them.
template <class Compute>
py::object or_none(Compute&& compute) {
  try {
    return compute();
  } catch (const std::runtime_error&) {
    return py::none();
  }
}

}  // namespace

py::object forward(py::handle x, py::handle w1, py::handle b1, py::handle w2, py::handle b2, py::handle residual,
                   py::handle out, int64_t act, int64_t gate, double slope, double offset, int64_t squeeze,
                   int64_t pre_act, int64_t post_act, py::handle scale, py::handle shift, const py::object& norm,
                   py::handle s) {
  Inputs in;
  View s_view, out_view;
  NormViews before;
  const bool is_in_place = out.ptr() == x.ptr();
  const bool has_norm = !norm.is_none();
  if (!run.forward || !view(x, in.x) || !view(w1, in.w1) || !view(b1, in.b1) || !view(w2, in.w2) || !view(b2, in.b2) ||
      !view(residual, in.residual) || !view(scale, in.scale) || !view(shift, in.shift) || !view(s, s_view) ||
      (!is_in_place && !view(out, out_view)) || (has_norm && !before.read(norm))) {
    PyErr_Clear();
    return py::none();
  }
  if (in.x.dim < 3) return py::none();
  const bool channels_last = !is_dense(in.x);
  if (channels_last && !is_dense(in.x, true)) return py::none();
  return or_none([&]() -> py::object {
    BlockForward f{};
    fill_forward(f, in, {act, gate, slope, offset, squeeze, pre_act, post_act}, channels_last);
    std::optional<Affine> affine;
    if (has_norm) {
      affine.emplace(before, f.c, f.dtype);
      f.scale = affine->scale, f.shift = affine->shift;
    }
    f.s = const_cast<void*>(weight_data("s", s_view, f.n, f.c, accumulator_dtype(f)));
    py::object y = out.is_none() ? new_like(x) : py::reinterpret_borrow<py::object>(out);
    if (is_in_place) {
      out_view = in.x;
    } else if (out.is_none()) {
      out_view = view_of(y);
    } else if (out_view.data != in.x.data) {
      require_apart("out", out_view, "x", in.x);
      require_apart("out", out_view, "residual", in.residual);
    }
    f.y = y_data(out_view, in, channels_last);
    const py::gil_scoped_release without_gil;
    run.forward(&f);
    return y;
  });
}

py::object batch_norm(py::handle x, py::handle residual, bool inplace, int64_t act, const py::tuple& norm) {
  Inputs in;
  NormViews before;
  if (!run.batch_norm || !view(x, in.x) || !view(residual, in.residual) || !before.read(norm)) {
    PyErr_Clear();
    return py::none();
  }
  const bool channels_last = in.x && !is_dense(in.x);
  return or_none([&]() -> py::object {
    BatchNorm f{};
    fill_batch_norm(f, in.x, in.residual, act, channels_last);
    const Affine affine(before, f.c, f.dtype);
    f.scale = affine.scale, f.shift = affine.shift;
    py::object y = inplace ? py::reinterpret_borrow<py::object>(x) : new_like(x);
    f.y = y_data(view_of(y), in, channels_last);
    const py::gil_scoped_release without_gil;
    run.batch_norm(&f);
    return y;
  });
}

py::object fold(py::handle weight, py::handle bias, const py::tuple& norm) {
  View w, b;
  NormViews after;
  if (!run.forward || !view(weight, w) || !view(bias, b) || !after.read(norm)) {
    PyErr_Clear();
    return py::none();
  }
  return or_none([&]() -> py::object {
    require(w.dim >= 2 && w.numel() > 0 && is_dense(w), "no dense weight");
    require(element_bytes(w.dtype) > 2, "a half-precision weight times a scale could underflow");
    const Affine affine(after, w.sizes[0], w.dtype);
    py::object folded = new_like(weight), shift = new_like(norm[2]);
    const View f = view_of(folded), s = view_of(shift);
    require(is_dense(f) && s.dtype == w.dtype, "a result of another layout or dtype");
    w.dtype == DType::kFloat64 ? fold_rows<double>(w, b, affine, f, s) : fold_rows<float>(w, b, affine, f, s);
    return py::make_tuple(folded, shift);
  });
}

}  // namespace se::fast_path
