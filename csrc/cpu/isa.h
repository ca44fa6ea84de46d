// What each instruction set's source file offers to the dispatcher.
#pragma once

#include "../include/api.h"

namespace ck {

struct IsaTable {
  const char* name;
  void (*run_panel)(const Panel&);
  void (*exp_run)(const float* x, float* out, int64_t n);
};

extern const IsaTable kBaseline;
#ifdef CK_X86
extern const IsaTable kAvx2;
extern const IsaTable kAvx512;
#endif

}  // namespace ck
