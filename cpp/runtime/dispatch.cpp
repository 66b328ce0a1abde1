#include "runtime/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "runtime/cpu.hpp"

namespace taper {

#if !defined(TAPER_HAS_NEON)
const Kernels* neon_kernels() { return nullptr; }
const Kernels* neon_i8mm_kernels() { return nullptr; }
#endif
#if !defined(TAPER_HAS_AVX2)
const Kernels* avx2_kernels() { return nullptr; }
#endif
#if !defined(TAPER_HAS_AVX512)
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* amx_kernels() { return nullptr; }
const Kernels* amx_emulated_kernels() { return nullptr; }
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* (*table)();
  bool (*cpu_has_it)();
  bool only_for_tests = false;  // runs when it is named, and is neither listed nor chosen
};

bool always() { return true; }

// Plainest first.
constexpr InstructionSet kSets[] = {
    {"reference", reference_kernels, always},
    {"neon", neon_kernels, cpu_has_neon},
    {"neon_i8mm", neon_i8mm_kernels, cpu_has_neon_i8mm},
    {"avx2", avx2_kernels, cpu_has_avx2},
    {"avx512", avx512_kernels, cpu_has_avx512},
    {"amx", amx_kernels, cpu_has_amx},
    {"amx_emulated", amx_emulated_kernels, cpu_has_avx512, true},
};

const Kernels* find(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : kSets) {
    if (!set.only_for_tests) known += (known.empty() ? "" : ", ") + std::string(set.name);
    if (name != set.name) continue;
    if (set.table() == nullptr) throw std::invalid_argument("instruction set " + name + " is not in this build");
    if (!set.cpu_has_it()) throw std::invalid_argument("this processor lacks instruction set " + name);
    return set.table();
  }
  throw std::invalid_argument("unknown instruction set '" + name + "', expected one of " + known);
}

std::atomic<const Kernels*> in_use{nullptr};

const Kernels* choose() {
  const char* forced = std::getenv("TAPER_ISA");
  return find(forced != nullptr && *forced != '\0' ? forced : available_isas().back());
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = in_use.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = choose();
    in_use.store(table, std::memory_order_release);
  }
  return *table;
}

void use_isa(const std::string& name) { in_use.store(find(name), std::memory_order_release); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kSets) {
    if (!set.only_for_tests && set.table() != nullptr && set.cpu_has_it()) names.emplace_back(set.name);
  }
  return names;
}

}  // namespace taper
