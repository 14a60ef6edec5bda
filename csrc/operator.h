// Operators whose arguments and results are structs with SAML_FIELDS, in the order of the schema: its text, the reading
// of the arguments and the writing of the results follow from the fields.
//
// The kernel is registered boxed: it takes its arguments from the dispatcher's stack, as the generated wrapper of an
// unboxed kernel does, so that a call costs no more.
#pragma once

#include <ATen/core/stack.h>
#include <torch/library.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "activation.h"

namespace saml_kernels {

template <typename Struct>
std::string schema_fields();

// A field that has fields of its own stands for those.
template <typename Field>
std::string schema_field(const std::string& name) {
  constexpr bool is_ints =
      std::is_same_v<Field, std::vector<int64_t>> || std::is_same_v<Field, std::vector<Activation>>;
  if constexpr (std::is_same_v<Field, at::Tensor>) return "Tensor " + name;
  if constexpr (std::is_same_v<Field, std::optional<at::Tensor>>) return "Tensor? " + name;
  if constexpr (std::is_same_v<Field, std::vector<at::Tensor>>) return "Tensor[] " + name;
  if constexpr (is_ints) return "int[] " + name;
  if constexpr (std::is_same_v<Field, Score> || std::is_same_v<Field, Rounding>) return "int " + name;
  if constexpr (std::is_same_v<Field, double>) return "float " + name;
  if constexpr (std::is_same_v<Field, bool>) return "bool " + name;
  if constexpr (requires(Field field) { field.fields(); }) return schema_fields<Field>();
}

// "Tensor x_local, Tensor[] branch_weights, …"
template <typename Struct>
std::string schema_fields() {
  std::istringstream names(Struct::field_names());
  std::string text, name;
  const auto add = [&]<typename Field>(const Field&) {
    std::getline(names >> std::ws, name, ',');
    text += (text.empty() ? "" : ", ") + schema_field<Field>(name);
  };
  std::apply([&](const auto&... fields) { (add(fields), ...); }, Struct{}.fields());
  return text;
}

inline int64_t checked(const char* what, int64_t number, size_t count) {
  TORCH_CHECK_VALUE(0 <= number && number < static_cast<int64_t>(count), what, " must lie in [0, ", count, "), got ",
                    number);
  return number;
}

inline void read(c10::IValue*& next, std::vector<Activation>& field) {
  for (const int64_t number : next++->toIntVector()) {
    field.push_back(static_cast<Activation>(checked("activations", number, std::size(kActivations))));
  }
}

inline void read(c10::IValue*& next, Score& field) {
  field = static_cast<Score>(checked("score", next++->toInt(), std::size(kScores)));
}

inline void read(c10::IValue*& next, Rounding& field) {
  field = static_cast<Rounding>(checked("foreign_rounding", next++->toInt(), kRoundings));
}

template <typename Field>
void read(c10::IValue*& next, Field& field) {
  if constexpr (requires { field.fields(); }) {
    std::apply([&](auto&... inner) { (read(next, inner), ...); }, field.fields());
  } else if constexpr (requires { field.push_back(field.front()); }) {
    // AOTInductor hands over an empty list as nothing.
    c10::IValue list = std::move(*next++);
    if (!list.isNone()) {
      field = std::move(list).to<Field>();
    }
  } else {
    field = std::move(*next++).to<Field>();
  }
}

template <typename Function>
struct operator_types;
template <typename Results, typename Arguments>
struct operator_types<Results (*)(const Arguments&)> {
  using results = Results;
  using arguments = Arguments;
};

template <auto function>
void call_with_structs(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const size_t count = handle.schema().arguments().size();
  c10::IValue* next = stack->data() + (stack->size() - count);
  typename operator_types<decltype(function)>::arguments arguments{};
  read(next, arguments);
  torch::jit::drop(*stack, count);
  auto results = function(arguments);
  std::apply([&](auto&... fields) { (stack->emplace_back(std::move(fields)), ...); }, results.fields());
}

// name(arguments of the function) -> (its results)
template <auto function>
std::string schema(const char* name) {
  using types = operator_types<decltype(function)>;
  return std::string(name) + "(" + schema_fields<typename types::arguments>() + ") -> (" +
         schema_fields<typename types::results>() + ")";
}

template <auto function>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<&call_with_structs<function>>();
}

}  // namespace saml_kernels
