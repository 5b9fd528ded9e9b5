// Read this first: the symbols and options of the operation, and the argument structs that all native backends take.
//
//   u = pre_act(scale * x + shift)   z = squeeze(u)   h = act(W1 z + b1)   s = gate(W2 h + b2)
//   y = post_act(u * s + residual)
//
// Every map is dense, [N, C, L] or (channels_last) [N, L, C], where L is the number of spatial positions. Reductions
// and the excitation are computed in the accumulation type A: double for float64 maps, else float.
#pragma once

#include <cstdint>

namespace se {

// The order is that of ACTIVATIONS in se_fused/options.py; kHardSigmoid is only a gate.
enum class Activation : int32_t {
  kIdentity,
  kRelu,
  kRelu6,
  kSilu,
  kHardswish,
  kGelu,
  kGeluTanh,
  kLeakyRelu,
  kMish,
  kSigmoid,
  kTanh,
  kHardSigmoid,
};
constexpr int kActivations = static_cast<int>(Activation::kHardSigmoid) + 1;

// The order is that of SQUEEZES in se_fused/options.py.
enum class Squeeze : int32_t { kMean, kMax, kMeanMax };

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

struct Options {
  Activation act, gate, pre_act, post_act;
  double slope, offset;  // of a kHardSigmoid gate: clamp(slope * v + offset, 0, 1)
  Squeeze squeeze;
};

struct Problem {
  int64_t n, c, r, l;  // r = 0: the one-FC form
  bool channels_last;
  DType dtype, weight_dtype;  // of the maps; of w1, b1, w2, b2
  Options options;
  const void* x;         // map
  const void* residual;  // map, or null
  const void* w1;        // [R, C], null in the one-FC form
  const void* b1;        // [R], or null
  const void* w2;        // [C, R]; [C, C] in the one-FC form
  const void* b2;        // [C], or null
};

struct Forward : Problem {
  void* y;            // map; may be x
  void* z;            // A [N, C], or null; z, p1 and p2 are what backward needs besides the inputs
  void* p1;           // A [N, R], or null: W1 z + b1
  void* p2;           // A [N, C], or null: W2 h + b2
  const void* scale;  // A [C], an eval-mode BatchNorm as one product and one sum; null: u = pre_act(x)
  const void* shift;  // A [C]; null with scale
};

// Forward with the gates as a result, which only the CPU kernels have.
struct BlockForward : Forward {
  void* s;  // A [N, C], or null; if given, the gates are written here and y = u
};

// An eval-mode BatchNorm as its module has it: scale = weight / sqrt(variance + epsilon), shift = bias - mean * scale.
struct Norm {
  int64_t c;
  DType dtype;  // of the vectors
  double epsilon;
  const void* weight;    // [C], or null
  const void* bias;      // [C], or null
  const void* mean;      // [C]
  const void* variance;  // [C]
};

// An eval-mode BatchNorm and what follows it: y = act(scale * x + shift + residual).
struct BatchNorm {
  int64_t n, c, l;
  bool channels_last;
  DType dtype;  // of the maps
  Activation act;
  const void* x;         // map
  const void* residual;  // map, or null
  const void* scale;     // A [C]; null on CUDA, whose kernel computes scale and shift from a Norm
  const void* shift;     // A [C]; null with scale
  void* y;               // map; may be x
};

struct Backward : Problem {
  const void* g;       // map: the gradient of y
  const void* z;       // A [N, C], as forward wrote it
  const void* p1;      // A [N, R], as forward wrote it; null in the one-FC form
  const void* p2;      // A [N, C], as forward wrote it
  bool residual_is_x;  // the gradient of the residual is added to dx
  void* dx;            // map; this and each gradient below is null if not wanted
  void* dw1;           // [R, C]
  void* db1;           // [R]
  void* dw2;           // [C, R]
  void* db2;           // [C]
  void* dresidual;     // map
};

}  // namespace se
