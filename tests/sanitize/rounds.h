// How much a driver does: `PROGRAM [ROUNDS [CALLERS [EVERY [FAULT]]]]`. Each round has other numbers; so many callers
// at once do them; one case of EVERY is taken, another one in the next round. A fault proves that the sanitizer is
// live:
//   overrun    scores one element short: a read past the end;
//   undefined  a signed overflow;
//   race       barriers let all pass, where teams.cpp is linked in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

struct Options {
  int rounds = 1;
  unsigned callers = 1;
  int every = 1;
  bool overrun = false, undefined = false, race = false;
};

inline Options options;

inline void read_options(int argc, char** argv) {
  if (argc > 1) options.rounds = std::atoi(argv[1]);
  if (argc > 2) options.callers = static_cast<unsigned>(std::atoi(argv[2]));
  if (argc > 3) options.every = std::atoi(argv[3]);
  const std::string fault = argc > 4 ? argv[4] : "";
  options.overrun = fault == "overrun", options.undefined = fault == "undefined", options.race = fault == "race";
}

// The sum of work(seed) over all rounds and callers.
template <typename Work>
int64_t run_rounds(const Work& work) {
  const unsigned callers = options.callers;
  std::vector<int64_t> done(callers);
  const auto call = [&](unsigned caller) {
    for (int round = 0; round < options.rounds; ++round) done[caller] += work(round * callers + caller + 1);
  };
  std::vector<std::thread> others;
  for (unsigned caller = 1; caller < callers; ++caller) others.emplace_back(call, caller);
  call(0);
  int64_t total = done[0];
  for (unsigned k = 1; k < callers; ++k) {
    others[k - 1].join();
    total += done[k];
  }
  return total;
}
