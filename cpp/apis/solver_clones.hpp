// Functions compiled once for each instruction set, chosen when the module is loaded. Their sums have one order and
// fuse only where written, so that all copies give the same bits.
#pragma once

#include <cstdint>  // for __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)  // musl has no ifunc
#define TAPER_CLONES __attribute__((target_clones("default", "fma", "avx512f")))
#else
#define TAPER_CLONES
#endif
