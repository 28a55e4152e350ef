// OpenMP where the compiler has it, one thread elsewhere.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
#endif
