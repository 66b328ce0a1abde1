// Every operation of every instruction set of this machine against the reference, byte for byte (kernel_checks.cpp).
// Arguments: the instruction sets that must be found here, plainest first; without them any will do.
#include <cstdio>
#include <string>
#include <vector>

#include "checks.hpp"

int main(int argc, char** argv) {
  const std::vector<std::string> wanted(argv + 1, argv + argc), found = taper::available_isas();
  std::printf("instruction sets:");
  for (const std::string& isa : found) std::printf(" %s", isa.c_str());
  std::printf("; in use: %s\n", taper::kernels().name);
  if (!wanted.empty() && (found != wanted || taper::kernels().name != wanted.back())) {
    std::printf("expected:");
    for (const std::string& isa : wanted) std::printf(" %s", isa.c_str());
    std::printf("\n");
    return 1;
  }
  if (found.size() > 1) taper::checks::check_kernels();
  std::printf("%d comparisons, %d failures\n", taper::checks::comparisons, taper::checks::failures);
  return taper::checks::failures == 0 ? 0 : 1;
}
