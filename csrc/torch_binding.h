// Registers the operators of a backend by the LibTorch stable ABI, and converts torch's tensors to Views (arguments.h).
#pragma once

#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "torch_c.h"

namespace se {
namespace {  // as in arguments.h

void check(AOTITorchError error, const char* what) { require(error == 0, "torch: ", what, " failed"); }

template <class Handle, AOTITorchError (*destroy)(Handle)>
struct Deleter {
  void operator()(Handle handle) const { destroy(handle); }
};

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  bool defined() const { return get<bool>(aoti_torch_is_defined); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  void* data() const { return get<void*>(aoti_torch_get_data_ptr); }

 private:
  template <class T>
  T get(AOTITorchError (*function)(AtenTensorHandle, T*)) const {
    T value{};
    check(function(handle_.get(), &value), "a property of a tensor");
    return value;
  }

  std::unique_ptr<AtenTensorOpaque, Deleter<AtenTensorHandle, aoti_torch_delete_tensor_object>> handle_;
};
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  throw std::runtime_error("se_fused: a tensor of an unsupported dtype");
}

View view(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.dim(), t.sizes(), t.strides(), dtype_of(t), t.data()};
}
View view(const OptionalTensor& t) { return t ? view(*t) : View{}; }

// As data_of; `t` must be row-major.
void* row_major_data(const char* name, const View& t, int64_t numel, DType dtype) {
  require(!t || numel == 0 || is_dense(t), name, " is not row-major");
  return data_of(name, t, numel, dtype);
}

// The operators of a Backend, which has run(const Forward&, const Tensor& x) and run(const Backward&, const Tensor& x).
template <class Backend>
void forward_out(const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& w2,
                 const OptionalTensor& b2, const OptionalTensor& residual, const OptionalTensor& scale,
                 const OptionalTensor& shift, int64_t act, int64_t gate, double slope, double offset, int64_t squeeze,
                 int64_t pre_act, int64_t post_act, bool channels_last, const Tensor& y, const OptionalTensor& z,
                 const OptionalTensor& p1, const OptionalTensor& p2) {
  Forward f{};
  const Inputs in{view(x), view(w1), view(b1), view(w2), view(b2), view(residual), view(scale), view(shift)};
  fill_forward(f, in, {act, gate, slope, offset, squeeze, pre_act, post_act}, channels_last);
  f.y = y_data(view(y), in, channels_last);
  f.z = row_major_data("z", view(z), f.n * f.c, accumulator_dtype(f));
  f.p1 = row_major_data("p1", view(p1), f.n * f.r, accumulator_dtype(f));
  f.p2 = row_major_data("p2", view(p2), f.n * f.c, accumulator_dtype(f));
  Backend::run(f, x);
}

template <class Backend>
void backward_out(const Tensor& g, const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1,
                  const Tensor& w2, const OptionalTensor& b2, const OptionalTensor& residual, const Tensor& z,
                  const Tensor& p1, const Tensor& p2, int64_t act, int64_t gate, double slope, double offset,
                  int64_t squeeze, int64_t pre_act, int64_t post_act, bool channels_last, bool residual_is_x,
                  const OptionalTensor& dx, const OptionalTensor& dw1, const OptionalTensor& db1,
                  const OptionalTensor& dw2, const OptionalTensor& db2, const OptionalTensor& dresidual) {
  Backward f{};
  const Inputs in{view(x), view(w1), view(b1), view(w2), view(b2), view(residual), {}, {}};
  fill_problem(f, in, {act, gate, slope, offset, squeeze, pre_act, post_act}, channels_last);
  f.g = map_data("g", view(g), in.x, channels_last);
  f.z = row_major_data("z", view(z), f.n * f.c, accumulator_dtype(f));
  f.p1 = row_major_data("p1", view(p1), f.n * f.r, accumulator_dtype(f));
  f.p2 = row_major_data("p2", view(p2), f.n * f.c, accumulator_dtype(f));
  require(f.g && f.z && f.p2 && (f.p1 || f.r == 0), "no g, z, p1 or p2");
  f.residual_is_x = residual_is_x;
  f.dx = map_data("dx", view(dx), in.x, channels_last);
  f.dw1 = row_major_data("dw1", view(dw1), f.r * f.c, f.weight_dtype);
  f.db1 = row_major_data("db1", view(db1), f.r, f.weight_dtype);
  f.dw2 = row_major_data("dw2", view(dw2), f.c * (f.r ? f.r : f.c), f.weight_dtype);
  f.db2 = row_major_data("db2", view(db2), f.c, f.weight_dtype);
  f.dresidual = map_data("dresidual", view(dresidual), in.x, channels_last);
  Backend::run(f, x);
}

// The batch norm of these vectors, which no output may overlap.
Norm norm_of(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
             double epsilon, std::initializer_list<std::pair<const char*, View>> outputs) {
  const View m = view(mean);
  require(m.dim == 1, "mean is no [C]");
  Norm norm{};
  norm.c = m.sizes[0];
  norm.dtype = m.dtype;
  norm.epsilon = epsilon;
  norm.weight = weight_data("weight", view(weight), norm.c, 0, norm.dtype);
  norm.bias = weight_data("bias", view(bias), norm.c, 0, norm.dtype);
  norm.mean = weight_data("mean", m, norm.c, 0, norm.dtype);
  norm.variance = weight_data("variance", view(variance), norm.c, 0, norm.dtype);
  for (const auto& [name, output] : outputs) {
    require_apart(name, output, "weight", view(weight));
    require_apart(name, output, "bias", view(bias));
    require_apart(name, output, "mean", m);
    require_apart(name, output, "variance", view(variance));
  }
  return norm;
}

// The operators for an eval-mode BatchNorm, of a Backend which has run(const BatchNorm&, const Norm&, const Tensor& x)
// and run(const Norm&, void* scale, void* shift, const Tensor& mean).
template <class Backend>
void batch_norm_out(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                    const OptionalTensor& bias, const Tensor& mean, const Tensor& variance, double epsilon, int64_t act,
                    bool channels_last, const Tensor& y) {
  Inputs in{};
  in.x = view(x), in.residual = view(residual);
  BatchNorm f{};
  fill_batch_norm(f, in.x, in.residual, act, channels_last);
  f.y = y_data(view(y), in, channels_last);
  const Norm norm = norm_of(weight, bias, mean, variance, epsilon, {{"y", view(y)}});
  require(norm.c == f.c, "mean has ", norm.c, " elements; wanted ", f.c);
  require(norm.dtype == f.dtype || (norm.dtype == DType::kFloat32 && element_bytes(f.dtype) == 2),
          "a batch norm of another dtype than its map");
  Backend::run(f, norm, x);
}

template <class Backend>
void scale_shift_out(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                     const Tensor& variance, double epsilon, const Tensor& scale, const Tensor& shift) {
  const Norm norm = norm_of(weight, bias, mean, variance, epsilon, {{"scale", view(scale)}, {"shift", view(shift)}});
  require_apart("shift", view(shift), "scale", view(scale));
  const DType dtype = norm.dtype == DType::kFloat64 ? norm.dtype : DType::kFloat32;
  void* const k = row_major_data("scale", view(scale), norm.c, dtype);
  void* const b = row_major_data("shift", view(shift), norm.c, dtype);
  require(k && b && norm.c > 0, "no scale or shift, or no channels");
  Backend::run(norm, k, b, mean);
}

// Calls `function` by torch's boxed convention: the arguments are on a stack, and no result is pushed.
template <auto function>
struct Boxed;
template <class... Parameters, void (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    require(arguments == sizeof...(Parameters) && results == 0, "another schema than the library's");
    call(stack, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... i>
  static void call(StableIValue* stack, std::index_sequence<i...>) {
    const std::tuple<std::decay_t<Parameters>...> arguments{take<std::decay_t<Parameters>>(stack[i])...};
    std::apply(function, arguments);
  }

  template <class T>
  static T take(StableIValue value) {
    if constexpr (std::is_same_v<T, Tensor>) {
      return Tensor(reinterpret_cast<AtenTensorHandle>(value));
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(value));
      return inner ? OptionalTensor(take<Tensor>(*inner)) : std::nullopt;
    } else {
      static_assert(std::is_arithmetic_v<T> && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
      T number;
      std::memcpy(&number, &value, sizeof number);
      return number;
    }
  }
};

// Registers the operators of a Backend for a dispatch key, as long as the object lives.
template <class Backend>
class Registered {
 public:
  explicit Registered(const char* dispatch_key) {
    constexpr uint64_t kTorch_2_10 = 0x020a000000000000;
    TorchLibraryHandle library = nullptr;
    // No error is thrown: an exception while the library is loaded would end the process, and torch reports a call of
    // an operator that is not registered.
    if (aoti_torch_library_init_impl("se_fused", dispatch_key, __FILE__, __LINE__, &library) != 0) return;
    library_.reset(library);
    torch_library_impl(library, "forward_out", &Boxed<&forward_out<Backend>>::call, kTorch_2_10);
    torch_library_impl(library, "backward_out", &Boxed<&backward_out<Backend>>::call, kTorch_2_10);
    if constexpr (Backend::kHasBatchNorm) {
      torch_library_impl(library, "batch_norm_out", &Boxed<&batch_norm_out<Backend>>::call, kTorch_2_10);
      torch_library_impl(library, "scale_shift_out", &Boxed<&scale_shift_out<Backend>>::call, kTorch_2_10);
    }
  }

 private:
  std::unique_ptr<TorchLibraryOpaque, Deleter<TorchLibraryHandle, aoti_torch_delete_library_object>> library_;
};

}  // namespace
}  // namespace se
