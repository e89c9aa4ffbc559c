#include "common/status.h"

#include <cstdarg>
#include <cstdio>

namespace tersor {

static thread_local char last_error[512] = "";

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace tersor

extern "C" const char* tersor_last_error(void) { return tersor::last_error; }
