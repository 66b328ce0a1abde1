#include "runtime/cpu.hpp"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace taper {
namespace {

struct Features {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_ecx = 0;
  uint32_t leaf7_edx = 0;
  uint64_t xcr0 = 0;  // register files that the operating system saves
};

uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

Features read_features() {
  Features found;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  found.leaf1_ecx = ecx;
  if (ecx & bit_OSXSAVE) found.xcr0 = read_xcr0();
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    found.leaf7_ebx = ebx;
    found.leaf7_ecx = ecx;
    found.leaf7_edx = edx;
  }
  return found;
}

const Features& features() {
  static const Features found = read_features();
  return found;
}

bool has(uint64_t value, uint64_t wanted) { return (value & wanted) == wanted; }

// Linux saves the 8 KiB of tiles only for processes that asked; threads, also those there are already, inherit it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtiledata) == 0;
#else
  return false;
#endif
}

}  // namespace

bool cpu_has_avx2() {
  const Features& f = features();
  const uint64_t ymm_state = 0x6;  // SSE and AVX
  return has(f.xcr0, ymm_state) && has(f.leaf1_ecx, bit_AVX | bit_FMA | bit_F16C) &&
         has(f.leaf7_ebx, bit_AVX2 | bit_BMI2);
}

bool cpu_has_avx512() {
  const Features& f = features();
  const uint64_t zmm_state = 0xe6;  // SSE, AVX, opmask, upper halves of zmm0-15, zmm16-31
  const uint32_t vbmi = 1u << 1, vbmi2 = 1u << 6, gfni = 1u << 8, vnni = 1u << 11;
  return cpu_has_avx2() && has(f.xcr0, zmm_state) &&
         has(f.leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ) &&
         has(f.leaf7_ecx, vbmi | vbmi2 | gfni | vnni);
}

bool cpu_has_amx() {
  const Features& f = features();
  const uint64_t tile_state = 0x60000;  // configuration and data
  const uint32_t tile = 1u << 24, int8 = 1u << 25;
  if (!cpu_has_avx512() || !has(f.xcr0, tile_state) || !has(f.leaf7_edx, tile | int8)) return false;
  static const bool granted = may_use_tiles();
  return granted;
}

}  // namespace taper

#else

namespace taper {

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_amx() { return false; }

}  // namespace taper

#endif
