// How often a driver does its work: `PROGRAM [ROUNDS]`, with other numbers in each round, and with -DCK_CALLERS=n by n
// callers at once; with -DCK_EVERY=n it takes one case of n.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#ifndef CK_CALLERS
#define CK_CALLERS 1
#endif
#ifndef CK_EVERY
#define CK_EVERY 1
#endif

// The sum of work(seed) over all rounds and callers.
template <typename Work>
int64_t run_rounds(int argc, char** argv, const Work& work) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  std::vector<int64_t> done(CK_CALLERS);
  const auto call = [&](unsigned caller) {
    for (int round = 0; round < rounds; ++round) done[caller] += work(round * CK_CALLERS + caller + 1);
  };
  std::vector<std::thread> others;
  for (unsigned caller = 1; caller < CK_CALLERS; ++caller) others.emplace_back(call, caller);
  call(0);
  int64_t total = done[0];
  for (unsigned k = 1; k < CK_CALLERS; ++k) {
    others[k - 1].join();
    total += done[k];
  }
  return total;
}
