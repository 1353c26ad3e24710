// The activations, in float32 between two conversions: what moe_ops/reference.py calls `activate`.
#pragma once

#include <cmath>
#include <cstdint>

#include "checks.h"

namespace moe_ops {

template <Nonlinearity kind>
inline float nonlinearity(float gate, float alpha) {
  constexpr float kSqrtHalf = 0.70710678118654752f;
  constexpr float kSqrtTwoOverPi = 0.79788456080286536f;
  switch (kind) {
    case Nonlinearity::kSilu: return gate / (1.0f + std::exp(-gate));
    case Nonlinearity::kGelu: return 0.5f * gate * (1.0f + std::erf(gate * kSqrtHalf));
    case Nonlinearity::kGeluTanh:
      return 0.5f * gate * (1.0f + std::tanh(kSqrtTwoOverPi * (gate + 0.044715f * gate * gate * gate)));
    case Nonlinearity::kSwigluoai: return gate / (1.0f + std::exp(-alpha * gate));
    // Written so that a NaN stays one.
    case Nonlinearity::kRelu2: return gate < 0.0f ? 0.0f : gate * gate;
  }
  return gate;
}

// One row of the up projection -> one row of the activation, [I]. `factor` multiplies the projection before `bias`
// (nullptr: none), which has the order of the columns of `up`.
template <Nonlinearity kind, typename T>
void activate_row(const T* up, const float* bias, float factor, const Problem& problem, T* act) {
  const int64_t size = problem.intermediate_size;
  const int64_t step = problem.interleaved ? 2 : 1, to_up = problem.interleaved ? 1 : size;
  const auto value = [&](int64_t column) {
    const float product = static_cast<float>(up[column]) * factor;
    return bias == nullptr ? product : product + bias[column];
  };
  if (!problem.gated) {
    for (int64_t i = 0; i < size; ++i) act[i] = static_cast<T>(nonlinearity<kind>(value(i), problem.alpha));
    return;
  }
  const bool clamped = problem.limit.has_value();
  const float limit = problem.limit.value_or(0.0f), added = kind == Nonlinearity::kSwigluoai ? 1.0f : 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    float gate = value(i * step), other = value(i * step + to_up);
    if (clamped) {
      // Comparisons that are false for a NaN, which so stays one.
      gate = gate > limit ? limit : gate;
      other = other > limit ? limit : other < -limit ? -limit : other;
    }
    act[i] = static_cast<T>(nonlinearity<kind>(gate, problem.alpha) * (other + added));
  }
}

template <typename T>
void activate_row(const T* up, const float* bias, float factor, const Problem& problem, T* act) {
  switch (problem.nonlinearity) {
    case Nonlinearity::kSilu: return activate_row<Nonlinearity::kSilu>(up, bias, factor, problem, act);
    case Nonlinearity::kGelu: return activate_row<Nonlinearity::kGelu>(up, bias, factor, problem, act);
    case Nonlinearity::kGeluTanh: return activate_row<Nonlinearity::kGeluTanh>(up, bias, factor, problem, act);
    case Nonlinearity::kSwigluoai: return activate_row<Nonlinearity::kSwigluoai>(up, bias, factor, problem, act);
    case Nonlinearity::kRelu2: return activate_row<Nonlinearity::kRelu2>(up, bias, factor, problem, act);
  }
}

}  // namespace moe_ops
