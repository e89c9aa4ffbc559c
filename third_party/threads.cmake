# POSIX threads from the C library, for the fallback pool only: with torch in the process the
# kernels run on torch's own OpenMP threads, found at run time (cpp/common/parallel.cpp).
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
