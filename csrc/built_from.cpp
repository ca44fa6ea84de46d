// What the library was compiled from, as setup.py tells it.
#include "include/api.h"

namespace ck {

const char* version() { return CK_VERSION; }
const char* sources() { return CK_SOURCES; }

}  // namespace ck
