// What this processor and operating system can run.
#pragma once

namespace taper {

bool cpu_has_neon();       // Advanced SIMD with the int8 dot product
bool cpu_has_neon_i8mm();  // and the int8 matrix product

bool cpu_has_avx2();    // AVX2, FMA, F16C, BMI2, and an OS that keeps the ymm registers
bool cpu_has_avx512();  // F, BW, VL, DQ, VBMI, VBMI2, VNNI, GFNI, and an OS that keeps the zmm registers

// AVX-512 as above, AMX tiles and int8, and an OS that keeps the tiles; asks Linux to let this process use them.
bool cpu_has_amx();

}  // namespace taper
