// A struct that names its fields: SAML_FIELDS(a, b) in its body gives it visit(visitor), which calls
// visitor(FieldName, field) for each of them in this order. A field that has fields of its own stands for those.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace saml_kernels {

// One of a list "a, b, c". Found when it is asked for: most visitors never do.
struct FieldName {
  std::string_view list;
  size_t index;

  std::string text() const {
    std::string_view rest = list;
    for (size_t i = 0; i < index; ++i) {
      rest.remove_prefix(rest.find(',') + 1);
    }
    rest = rest.substr(0, rest.find(','));
    return std::string(rest.substr(rest.find_first_not_of(' ')));
  }
};

template <typename Visitor, typename... Fields>
void visit_fields(Visitor& visitor, std::string_view names, Fields&... fields) {
  size_t index = 0;
  const auto visit = [&](auto& field) {
    if constexpr (requires { field.visit(visitor); }) {
      field.visit(visitor);
    } else {
      visitor(FieldName{names, index}, field);
    }
    ++index;
  };
  (visit(fields), ...);
}

#define SAML_FIELDS(...)                              \
  template <typename Visitor>                         \
  void visit(Visitor& visitor) {                      \
    visit_fields(visitor, #__VA_ARGS__, __VA_ARGS__); \
  }

}  // namespace saml_kernels
