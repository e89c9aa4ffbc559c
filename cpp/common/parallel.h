// parallel_for: the one way in which kernels use threads.
//
// No OpenMP runtime is linked. torch's wheel brings its own, and a second pool spinning on the same
// cores costs more than a decode step. When an OpenMP runtime with the GNU entry points is already
// in the process (torch loads one), regions run on its threads; otherwise on a small pool of ours.
#pragma once

namespace tersor {

using ParallelBody = void (*)(void* context, int index);

// Calls body(context, i) once for each i in [0, threads), perhaps at the same time; returns when all
// are done. Bodies must not wait for one another: fewer real threads than asked for may run them.
void parallel_run(int threads, ParallelBody body, void* context);

// "openmp" (the process's own runtime) or "pool".
const char* threading_name();

template <class Function>
void parallel_for(int threads, const Function& function) {
  if (threads <= 1) {
    function(0);
    return;
  }
  parallel_run(
      threads, [](void* context, int index) { (*static_cast<const Function*>(context))(index); },
      const_cast<Function*>(&function));
}

// The part [begin, end) of [0, total) that belongs to one of `parts` workers, balanced to one item.
struct Range {
  long begin, end;
};
static inline Range split(long total, long parts, long index) {
  return {total * index / parts, total * (index + 1) / parts};
}

}  // namespace tersor
