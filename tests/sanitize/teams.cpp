// What gcc's code for OpenMP calls, by threads of C++: ThreadSanitizer sees their order, and not that of libgomp, which
// is built without it. Linked in libgomp's place; teams are not nested.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "rounds.h"

namespace {

struct Team {
  unsigned members, arrived = 0, generation = 0;
  std::mutex lock;
  std::condition_variable all;
};

thread_local Team* team = nullptr;
thread_local int number = 0;

void run(Team* of, int as, void (*body)(void*), void* data) {
  team = of, number = as;
  body(data);
  team = nullptr, number = 0;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? static_cast<int>(team->members) : 1; }

void GOMP_barrier() {
  if (!team || options.race) return;
  std::unique_lock<std::mutex> held(team->lock);
  const unsigned mine = team->generation;
  if (++team->arrived == team->members) {
    team->arrived = 0, ++team->generation;
    team->all.notify_all();
  }
  team->all.wait(held, [&] { return team->generation != mine; });
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned members, unsigned) {
  Team shared;
  shared.members = members;
  std::vector<std::thread> threads;
  for (unsigned k = 1; k < members; ++k) threads.emplace_back(run, &shared, static_cast<int>(k), body, data);
  run(&shared, 0, body, data);
  for (std::thread& each : threads) each.join();
}
}
