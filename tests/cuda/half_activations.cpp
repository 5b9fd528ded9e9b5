// The activations of half-precision maps as csrc/cuda/activations.cuh has them, before their results are rounded.
#include "activations.cuh"

// No kernel runs here.
const emulator::Position& emulator::position() {
  static emulator::Position none{};
  return none;
}

namespace {

template <class T, int V>
void apply(se::Activation activation, const T* x, float* y, float* slope, int64_t count) {
  for (int64_t i = 0; i < count; i += V) {
    float v[V], at[V], g[V];
    for (int j = 0; j < V; ++j) v[j] = at[j] = se::cuda::widen(x[i + j]), g[j] = 1;
    se::cuda::activate<T>(activation, se::Options{}, v);
    se::cuda::activation_backward<T>(activation, se::Options{}, at, g);
    std::memcpy(y + i, v, sizeof(v));
    std::memcpy(slope + i, g, sizeof(g));
  }
}

template <class T>
void apply(int width, se::Activation activation, const void* x, float* y, float* slope, int64_t count) {
  (width == 8 ? apply<T, 8> : apply<T, 1>)(activation, static_cast<const T*>(x), y, slope, count);
}

}  // namespace

// y = activation(x), slope = activation'(x) of `count` elements, a multiple of `width`, which is 1 or 8; directions:
// those of the approximations' errors.
extern "C" __attribute__((visibility("default"))) void half_activations(int activation, int dtype, int width,
                                                                        unsigned directions, const void* x, float* y,
                                                                        float* slope, int64_t count) {
  emulator::directions = directions;
  const bool bfloat16 = static_cast<se::DType>(dtype) == se::DType::kBFloat16;
  (bfloat16 ? apply<__nv_bfloat16> : apply<__half>)(width, static_cast<se::Activation>(activation), x, y, slope, count);
}
