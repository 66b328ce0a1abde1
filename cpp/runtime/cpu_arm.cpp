#include "runtime/cpu.hpp"

#if defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>

namespace taper {
namespace {

// Bits of the kernel's <asm/hwcap.h>, whose older versions lack the later ones.
constexpr unsigned long kAdvancedSimd = 1ul << 1, kDotProduct = 1ul << 20;  // AT_HWCAP
constexpr unsigned long kInt8Matrices = 1ul << 13;                          // AT_HWCAP2

bool has(unsigned long type, unsigned long wanted) { return (getauxval(type) & wanted) == wanted; }

}  // namespace

bool cpu_has_neon() { return has(AT_HWCAP, kAdvancedSimd | kDotProduct); }
bool cpu_has_neon_i8mm() { return cpu_has_neon() && has(AT_HWCAP2, kInt8Matrices); }

}  // namespace taper

#else

namespace taper {

bool cpu_has_neon() { return false; }
bool cpu_has_neon_i8mm() { return false; }

}  // namespace taper

#endif
