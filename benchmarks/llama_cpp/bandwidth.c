// Prints the fastest of PASSES reads of one buffer, in bytes per second: the reference that shares
// of bandwidth are taken of. Usage: bandwidth THREADS BYTES
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { PASSES = 5 };

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  omp_set_num_threads(atoi(argv[1]));
  const int64_t words = atoll(argv[2]) / (int64_t)sizeof(uint64_t);
  uint64_t* buffer = malloc((size_t)words * sizeof(uint64_t));
  if (!buffer) return 1;
#pragma omp parallel for schedule(static)  // first touched by the thread that reads it later
  for (int64_t i = 0; i < words; ++i) buffer[i] = (uint64_t)i;
  double best_s = 1e30;
  uint64_t sum = 0;
  for (int pass = 0; pass < PASSES; ++pass) {
    const double start_s = omp_get_wtime();
#pragma omp parallel for simd schedule(static) reduction(+ : sum)
    for (int64_t i = 0; i < words; ++i) sum += buffer[i];
    const double pass_s = omp_get_wtime() - start_s;
    if (pass_s < best_s) best_s = pass_s;
  }
  // The sum is printed so that no compiler may leave the reads out.
  printf("%.0f %llu\n", (double)words * sizeof(uint64_t) / best_s, (unsigned long long)sum);
  free(buffer);
  return 0;
}
