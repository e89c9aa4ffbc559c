// Errors of the C ABI: a code, and a sentence kept per thread.
#pragma once

#include "tersor.h"

namespace tersor {

int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace tersor
