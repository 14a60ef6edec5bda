// Operators whose arguments and results are structs (fields.h), fields in the order of the schema: its text, the
// reading of the arguments and the writing of the results follow from them.
//
// The kernel is registered boxed: it takes its arguments from the dispatcher's stack, as the generated wrapper of an
// unboxed kernel does, so that a call costs no more.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "activation.h"
#include "fields.h"

namespace saml_kernels {

// "Tensor x_local, Tensor[] branch_weights, …"
class SchemaText {
 public:
  void operator()(FieldName name, const at::Tensor&) { add("Tensor", name); }
  void operator()(FieldName name, const std::vector<at::Tensor>&) { add("Tensor[]", name); }
  void operator()(FieldName name, const std::vector<int64_t>&) { add("int[]", name); }
  void operator()(FieldName name, const std::vector<Activation>&) { add("int[]", name); }
  void operator()(FieldName name, const Score&) { add("int", name); }
  void operator()(FieldName name, const double&) { add("float", name); }
  void operator()(FieldName name, const bool&) { add("bool", name); }

  template <typename Struct>
  static std::string of() {
    SchemaText text;
    Struct fields{};
    fields.visit(text);
    return "(" + text.text_ + ")";
  }

 private:
  void add(const char* type, FieldName name) {
    text_ += (text_.empty() ? "" : ", ") + std::string(type) + " " + name.text();
  }

  std::string text_;
};

// Takes the fields from the last values of the stack.
class ArgumentReader {
 public:
  explicit ArgumentReader(c10::IValue* first) : next_(first) {}

  void operator()(FieldName, at::Tensor& field) { field = std::move(*next_++).toTensor(); }
  void operator()(FieldName, std::vector<at::Tensor>& field) { field = next_++->toTensorVector(); }
  void operator()(FieldName, std::vector<int64_t>& field) { field = next_++->toIntVector(); }
  void operator()(FieldName name, std::vector<Activation>& field) {
    for (const int64_t number : next_++->toIntVector()) {
      field.push_back(static_cast<Activation>(checked(name, number, std::size(kActivations))));
    }
  }
  void operator()(FieldName name, Score& field) {
    field = static_cast<Score>(checked(name, next_++->toInt(), std::size(kScores)));
  }
  void operator()(FieldName, double& field) { field = next_++->toDouble(); }
  void operator()(FieldName, bool& field) { field = next_++->toBool(); }

 private:
  static int64_t checked(FieldName name, int64_t number, size_t count) {
    TORCH_CHECK_VALUE(0 <= number && number < static_cast<int64_t>(count), name.text(), " must lie in [0, ", count,
                      "), got ", number);
    return number;
  }

  c10::IValue* next_;
};

struct ResultWriter {
  torch::jit::Stack& stack;

  template <typename Field>
  void operator()(FieldName, Field& field) {
    stack.emplace_back(std::move(field));
  }
};

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
  typename operator_types<decltype(function)>::arguments arguments{};
  ArgumentReader reader(stack->data() + (stack->size() - count));
  arguments.visit(reader);
  torch::jit::drop(*stack, count);
  auto results = function(arguments);
  ResultWriter writer{*stack};
  results.visit(writer);
}

// name(arguments of the function) -> (its results)
template <auto function>
std::string schema(const char* name) {
  using types = operator_types<decltype(function)>;
  return name + SchemaText::of<typename types::arguments>() + " -> " + SchemaText::of<typename types::results>();
}

template <auto function>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<&call_with_structs<function>>();
}

}  // namespace saml_kernels
