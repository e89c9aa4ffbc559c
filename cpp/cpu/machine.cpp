// What this machine can do at most: the floors that a roofline compares kernels with.
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/status.h"
#include "cpu/isa.h"

namespace tersor {
namespace {

double now() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// Operations per second of a loop on all threads. The best of many short rounds (half a millisecond):
// a round in which another process took the core does not count.
double rate(int threads, double seconds, double (*loop)(long)) {
  if (loop(1) == 0) return 0;
  long rounds = 1;
  for (double spent = 0; spent < 0.00025; rounds *= 2) {
    const double start = now();
    loop(rounds);
    spent = now() - start;
  }
  double best = 0;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    parallel_for(threads, [&](int) { loop(rounds); });
    const double achieved = loop(1) * rounds * threads / (now() - start);
    if (achieved > best) best = achieved;
  }
  return best;
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_machine_floors(int threads, double seconds, tersor_floors* floors) {
  if (threads < 1 || threads > 4096) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 to 4096", threads);
  if (!(seconds > 0 && seconds <= 60)) return fail(TERSOR_INVALID, "seconds is %g; accepted: above 0 to 60", seconds);
  const IsaKernels& isa = current_isa();
  const size_t bytes = size_t(512) << 20;  // far past any last-level cache
  char* data = static_cast<char*>(std::aligned_alloc(4096, bytes));
  if (!data) return fail(TERSOR_NO_MEMORY, "no memory for the %zu bytes that are read to measure bandwidth", bytes);
  huge_pages(data, bytes);
  parallel_for(threads, [&](int index) {
    const Range part = split(static_cast<long>(bytes >> 12), threads, index);
    std::memset(data + (part.begin << 12), index + 1, (part.end - part.begin) << 12);
  });
  // Pieces of 8 MB per thread, walking through the whole: long enough to stream, short enough that some
  // are not interrupted.
  const long pages = static_cast<long>(bytes >> 12), piece = 2048L * threads < pages ? 2048L * threads : pages;
  double best = 0;
  volatile uint64_t sink = 0;
  long at = 0;
  for (const double end = now() + seconds; now() < end || best == 0; at += piece) {
    if (at + piece > pages) at = 0;
    const double start = now();
    parallel_for(threads, [&](int index) {
      const Range part = split(piece, threads, index);
      const uint64_t sum = isa.read(data + ((at + part.begin) << 12), static_cast<size_t>(part.end - part.begin) << 12);
      if (index == 0) sink = sum;
    });
    const double achieved = static_cast<double>(piece << 12) / (now() - start);
    if (achieved > best) best = achieved;
  }
  (void)sink;
  std::free(data);
  floors->read_gbs = best * 1e-9;
  floors->fp32_gflops = rate(threads, seconds, isa.fp32) * 1e-9;
  floors->int8_gops = rate(threads, seconds, isa.int8) * 1e-9;
  floors->bf16_gflops = rate(threads, seconds, isa.bf16) * 1e-9;
  return TERSOR_OK;
}
