// How an argument is refused.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace taper {

// Builds "what 9, expected rule" from its parts.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  auto add = [&out](const auto& part) {
    if constexpr (requires { std::to_string(part); }) {
      out += std::to_string(part);
    } else {
      out += part;
    }
  };
  (add(parts), ...);
  return out;
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    throw std::invalid_argument(text(parts...));
}

}  // namespace taper
