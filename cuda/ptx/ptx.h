// Every instruction a kernel uses beyond plain C++: the only place with asm.
#pragma once

#include "ptx/async.h"
#include "ptx/bits.h"
#include "ptx/config.h"
#include "ptx/matrix.h"
#include "ptx/memory.h"
#include "ptx/sync.h"
#include "ptx/warp.h"
