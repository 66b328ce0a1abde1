// Threads that share one range of work at a time.
#pragma once

#include <cstdint>
#include <functional>

namespace taper {

constexpr int kMaxThreads = 1024;

// Threads that a parallel range may use, the caller's included. At first TAPER_NUM_THREADS, or available_cores().
// Throws std::invalid_argument when TAPER_NUM_THREADS is no number from 1 to kMaxThreads.
int num_threads();

// Throws std::invalid_argument outside 1..kMaxThreads.
void set_num_threads(int count);

// Calls body(begin, end) for pieces of [0, count) of `chunk` elements until all are done; the pieces are handed out as
// threads become free. Runs on the caller alone with threads == 1, when one chunk holds the range, inside another range
// or while another caller's range is running. The first exception of a body is thrown again here.
void parallel_for(int64_t count, int64_t chunk, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace taper
