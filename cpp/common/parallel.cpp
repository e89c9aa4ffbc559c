#include "common/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace tersor {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  bool resolve(void* library) {
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(library, "omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(library, "omp_get_num_threads"));
    return found();
  }
  bool found() const { return parallel && thread_num && num_threads; }
};

// Libraries opened RTLD_LOCAL are not seen by dlsym(RTLD_DEFAULT): look at each loaded one by name.
int visit_library(dl_phdr_info* info, size_t, void* result) {
  const char* base = std::strrchr(info->dlpi_name, '/');
  base = base ? base + 1 : info->dlpi_name;
  if (!std::strstr(base, "gomp") && !std::strstr(base, "iomp") && !std::strstr(base, "libomp")) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return 0;
  return static_cast<OpenMP*>(result)->resolve(library) ? 1 : 0;
}

// Once found it stays; while it is not there we look again, because torch may be imported later.
const OpenMP* openmp() {
  static std::atomic<const OpenMP*> known{nullptr};
  static std::atomic<int> attempts{0};
  const OpenMP* result = known.load(std::memory_order_acquire);
  if (result || attempts.load(std::memory_order_relaxed) > 64) return result;
  attempts.fetch_add(1, std::memory_order_relaxed);
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  static OpenMP found;
  if (known.load()) return known.load();
  if (found.resolve(RTLD_DEFAULT)) {
    known.store(&found, std::memory_order_release);
  } else {
    OpenMP candidate;
    dl_iterate_phdr(visit_library, &candidate);
    if (candidate.found()) {
      found = candidate;
      known.store(&found, std::memory_order_release);
    }
  }
  return known.load();
}

// A fixed set of sleeping threads, for processes without an OpenMP runtime. One region at a time;
// a second caller, or a region inside a region, runs its bodies itself.
class Pool {
 public:
  static Pool& instance() {
    // Threads do not survive fork(): a child starts a pool of its own and leaves the parent's be.
    static std::mutex mutex;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (!pool || owner != getpid()) {
      pool = new Pool;
      owner = getpid();
    }
    return *pool;
  }

  void run(int threads, ParallelBody body, void* context) {
    std::unique_lock<std::mutex> region(region_, std::try_to_lock);
    if (!region.owns_lock()) {
      for (int i = 0; i < threads; ++i) body(context, i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back(&Pool::work, this);
      body_ = body;
      context_ = context;
      threads_ = threads;
      next_ = 0;
      active_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return next_ >= threads_ && active_ == 0; });
  }

 private:
  void drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (next_ < threads_) {
      const int index = next_++;
      ++active_;
      const ParallelBody body = body_;
      void* const context = context_;
      lock.unlock();
      body(context, index);
      lock.lock();
      --active_;
    }
    if (active_ == 0) done_.notify_all();
  }
  void work() {
    unsigned long seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
      }
      drain();
    }
  }

  std::mutex region_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  ParallelBody body_ = nullptr;
  void* context_ = nullptr;
  int threads_ = 0, next_ = 0, active_ = 0;
  unsigned long generation_ = 0;
};

struct Region {
  const OpenMP* runtime;
  ParallelBody body;
  void* context;
  int threads;
};

void openmp_body(void* argument) {
  const Region& region = *static_cast<Region*>(argument);
  const int stride = region.runtime->num_threads();
  for (int i = region.runtime->thread_num(); i < region.threads; i += stride) region.body(region.context, i);
}

}  // namespace

void parallel_run(int threads, ParallelBody body, void* context) {
  if (const OpenMP* runtime = openmp()) {
    Region region{runtime, body, context, threads};
    runtime->parallel(openmp_body, &region, static_cast<unsigned>(threads), 0);
  } else {
    Pool::instance().run(threads, body, context);
  }
}

const char* threading_name() { return openmp() ? "openmp" : "pool"; }

}  // namespace tersor

extern "C" const char* tersor_threading(void) { return tersor::threading_name(); }
