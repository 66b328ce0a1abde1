// How many cores this process may use.
#pragma once

namespace taper {

// Physical cores within the process's CPU affinity and its cgroup's CPU quota; at least 1.
int available_cores();

}  // namespace taper
