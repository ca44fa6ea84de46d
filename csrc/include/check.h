// Checks of the library's own arguments: they guard against wrong calls from the Python side, not user input.
#pragma once

#include <stdexcept>
#include <string>

namespace ck {

inline void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("contrastive_kernels: ") + what);
}

}  // namespace ck
