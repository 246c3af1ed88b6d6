// A few threads that share the tasks of one kernel call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pd {

using TaskFn = void (*)(void* context, int64_t task);

int num_threads();

// Runs f(task) for every task in [0, num_tasks), in any order, on the pool's threads and the caller's; returns when all are
// done.
// A second, concurrent caller runs all of its tasks by itself.
void run_tasks(int64_t num_tasks, TaskFn f, void* context);

template <class F>
void parallel_for(int64_t num_tasks, F&& f) {
  run_tasks(num_tasks, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &f);
}

// This thread's scratch memory, 64-byte aligned, uninitialised, valid until the next call on this thread.
void* scratch(size_t num_bytes);

}  // namespace pd
