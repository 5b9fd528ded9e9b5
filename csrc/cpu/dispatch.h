// From a dtype known at run time to the element type that a kernel is instantiated for.
#pragma once

#include "../se.h"
#include "simd.h"

namespace se::cpu {
namespace {

// body(T{}) with the element type T of a map.
template <class Body>
void with_map_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kFloat64: return body(double{});
    case DType::kFloat16: return body(Half{});
    case DType::kBFloat16: return body(BFloat16{});
  }
}

// body(W{}) with the element type W of the weights; A is the accumulation type of the maps.
template <class A, class Body>
void with_weight_type(DType dtype, Body&& body) {
  if constexpr (std::is_same_v<A, double>) {
    body(double{});
  } else {
    switch (dtype) {
      case DType::kFloat16: return body(Half{});
      case DType::kBFloat16: return body(BFloat16{});
      default: return body(float{});
    }
  }
}

}  // namespace
}  // namespace se::cpu
