// se_fused._C: the instruction sets of this CPU, the plans of calls on a GPU, the fast path to the CPU kernels, and a
// comparison of dicts. It does not link to torch, so importing it needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/features.h"
#include "fast_path.h"
#include "plan.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_features() {
  std::vector<std::string> features{"baseline"};
  if (se::cpu::has_x86_64_v3()) features.emplace_back("x86-64-v3");
  if (se::cpu::has_x86_64_v4()) features.emplace_back("x86-64-v4");
  return features;
}

// Whether each dict has the keys and values of its tuple (key, value, key, value, ...), in this order. They are
// compared by identity; an Ellipsis stands for any value.
bool same_items(const py::list& dicts, const py::list& expected) {
  if (dicts.size() != expected.size()) return false;
  for (size_t i = 0; i < dicts.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(dicts.ptr(), i);
    PyObject* items = PyList_GET_ITEM(expected.ptr(), i);
    if (!PyDict_Check(dict) || !PyTuple_Check(items) || 2 * PyDict_Size(dict) != PyTuple_GET_SIZE(items)) return false;
    PyObject *key, *value;
    for (Py_ssize_t position = 0, j = 0; PyDict_Next(dict, &position, &key, &value); j += 2) {
      PyObject* wanted = PyTuple_GET_ITEM(items, j + 1);
      if (key != PyTuple_GET_ITEM(items, j) || (value != wanted && wanted != Py_Ellipsis)) return false;
    }
  }
  return true;
}

// CPython's number for the state of a class and of those that it inherits from: another one after each change, or 0.
unsigned version(PyObject* type) {
  const auto* cls = reinterpret_cast<const PyTypeObject*>(type);
  return PyType_HasFeature(const_cast<PyTypeObject*>(cls), Py_TPFLAGS_VALID_VERSION_TAG) ? cls->tp_version_tag : 0;
}

std::vector<unsigned> versions(const py::tuple& types) {
  std::vector<unsigned> all;
  for (const py::handle type : types) all.push_back(version(type.ptr()));
  return all;
}

// Whether the objects have these types, and `classes` these versions.
bool same_types(const py::tuple& objects, const py::tuple& types, const py::tuple& classes, const py::list& versions) {
  for (size_t i = 0; i < objects.size(); ++i) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(objects.ptr(), i)));
    if (type != PyTuple_GET_ITEM(types.ptr(), i)) return false;
  }
  for (size_t i = 0; i < classes.size(); ++i) {
    const unsigned long now = version(PyTuple_GET_ITEM(classes.ptr(), i));
    if (now == 0 || now != PyLong_AsUnsignedLong(PyList_GET_ITEM(versions.ptr(), i))) return false;
  }
  return true;
}

se::Device preset(const std::string& name) {
  std::string known;
  for (const se::Device& device : se::device_presets()) {
    if (device.name == name) return device;
    known += (known.empty() ? "" : ", ") + device.name;
  }
  throw std::invalid_argument("device is '" + name + "'; wanted one of " + known);
}

se::DType dtype_named(const std::string& name) {
  static const std::map<std::string, se::DType> known{{"float32", se::DType::kFloat32},
                                                      {"float64", se::DType::kFloat64},
                                                      {"float16", se::DType::kFloat16},
                                                      {"bfloat16", se::DType::kBFloat16}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::invalid_argument("dtype is '" + name + "'; wanted float32, float64, ...");
  return found->second;
}

std::vector<std::tuple<std::string, int64_t, int64_t, int, int>> launches(const se::Plan& plan) {
  std::vector<std::tuple<std::string, int64_t, int64_t, int, int>> list;
  for (int i = 0; i < plan.launch_count; ++i) {
    const se::Launch& l = plan.launches[i];
    list.emplace_back(l.name, l.blocks, l.shared_bytes, l.cluster, l.threads);
  }
  return list;
}

se::Plan plan(const se::Device& device, bool backward, int64_t n, int64_t c, int64_t r, int64_t l,
              const std::string& dtype, bool channels_last, int alignment, int squeeze, bool pre_act, bool post_act,
              bool residual, const std::string& forced) {
  for (const auto& [name, size] : {std::pair{"n", n}, {"c", c}, {"l", l}}) {
    if (size < 1) throw std::invalid_argument(std::string(name) + " is " + std::to_string(size) + "; wanted 1 or more");
  }
  if (squeeze < 0 || squeeze > 2) throw std::invalid_argument("squeeze is no code of enum Squeeze");
  se::Call call{};
  call.direction = backward ? se::Direction::kBackward : se::Direction::kForward;
  call.n = n, call.c = c, call.r = r, call.l = l;
  call.dtype = dtype_named(dtype);
  call.channels_last = channels_last;
  call.alignment = alignment;
  call.squeeze = static_cast<se::Squeeze>(squeeze);
  call.pre_act = pre_act, call.post_act = post_act, call.residual = residual;
  call.dx = call.dw = true;
  return se::make_plan(call, device, forced);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The instruction sets of this CPU, the plans of calls on a GPU, the fast path to the CPU kernels.";
  m.def("cpu_features", &cpu_features, "Those instruction sets, of the ones compiled for, that this CPU has.");

  m.def("connect", &se::fast_path::connect, py::arg("forward"), py::arg("batch_norm"), py::arg("types"),
        py::arg("empty_like"),
        "Make forward() and batch_norm() call the functions at these addresses, for tensors of these types. False if "
        "this torch has no DLPack exchange.");
  // csrc/fast_path.h describes these three.
  m.def("forward", &se::fast_path::forward,
        "squeeze_excite of x, w1, b1, w2, b2, residual, out, the options as numbers (se.h), scale, shift, norm, s.");
  m.def("batch_norm", &se::fast_path::batch_norm, "act(norm(x) + residual) of x, residual, inplace, act, norm.");
  m.def("fold", &se::fast_path::fold, "Weight and bias of a convolution with `norm` after it: of weight, bias, norm.");
  m.def("same_items", &same_items,
        "Whether each dict has the items (key, value, key, value, ...), in this order, by identity. An Ellipsis stands "
        "for any value.");

  m.def("versions", &versions, "A number for the state of each class: another one after each change, or 0.");
  m.def("same_types", &same_types, "Whether these objects have these types, and these classes these versions.");

  py::class_<se::Device>(m, "Device", "The limits of a GPU that plans depend on.")
      .def(py::init<std::string, int, int, int64_t, int64_t, std::array<int, 5>, double, int64_t>(), py::arg("name"),
           py::arg("capability"), py::arg("sm_count"), py::arg("shared_per_block"), py::arg("shared_per_sm"),
           py::arg("clusters"), py::arg("bytes_per_us"), py::arg("l2_bytes"))
      .def_readonly("name", &se::Device::name)
      .def_readonly("capability", &se::Device::capability)
      .def_readonly("sm_count", &se::Device::sm_count)
      .def_readonly("shared_per_block", &se::Device::shared_per_block)
      .def_readonly("shared_per_sm", &se::Device::shared_per_sm)
      .def_readonly("clusters", &se::Device::clusters)
      .def_readonly("bytes_per_us", &se::Device::bytes_per_us)
      .def_readonly("l2_bytes", &se::Device::l2_bytes);
  m.def("device_presets", &se::device_presets, "The known GPUs.");
  m.def("preset", &preset, py::arg("name"), "The known GPU of this name.");

  py::class_<se::Plan>(m, "Plan", "The kernels that a call launches, and how (csrc/plan.h).")
      .def("__str__", &se::Plan::text)
      .def_property_readonly(
          "launches", &launches,
          "Of each launch, in order: name, blocks, bytes of shared memory, blocks per cluster, threads per block.")
      .def_readonly("fused_hidden", &se::Plan::fused_hidden)
      .def_readonly("map_bytes_read", &se::Plan::map_bytes_read)
      .def_readonly("map_bytes_written", &se::Plan::map_bytes_written)
      .def_readonly("scratch_bytes", &se::Plan::scratch_bytes)
      .def_property_readonly("vec_bytes", [](const se::Plan& p) { return p.reduction.vec_bytes; })
      .def_property_readonly("threads_per_row", [](const se::Plan& p) { return p.reduction.threads_per_row; })
      .def_property_readonly("splits", [](const se::Plan& p) { return p.reduction.splits; })
      .def_property_readonly("rows", [](const se::Plan& p) { return p.reduction.rows; })
      .def_property_readonly("first_wave", [](const se::Plan& p) { return p.cluster_config.first_wave; })
      .def_property_readonly("stagger_ns", [](const se::Plan& p) { return p.cluster_config.stagger_ns; })
      .def_property_readonly("predicted_us", [](const se::Plan& p) { return p.predicted.us(); })
      .def_property_readonly("per_block", [](const se::Plan& p) { return p.elementwise.per_block; });
  m.def("plan", &plan, py::arg("device"), py::kw_only(), py::arg("backward") = false, py::arg("n"), py::arg("c"),
        py::arg("r"), py::arg("l"), py::arg("dtype") = "float32", py::arg("channels_last") = false,
        py::arg("alignment") = 16, py::arg("squeeze") = 0, py::arg("pre_act") = false, py::arg("post_act") = false,
        py::arg("residual") = false, py::arg("forced") = "",
        "The plan of a call. Raises ValueError, naming the limit, if a forced plan cannot run the call.");
}
