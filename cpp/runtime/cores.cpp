#include "runtime/cores.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace taper {
namespace {

#if defined(__linux__)

// The hardware threads of a core list the same siblings, so distinct lists count cores.
int cores_in_affinity() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 0;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    std::string siblings = "cpu" + std::to_string(cpu);  // where the kernel does not say: a core of its own
    std::ifstream file(base + "thread_siblings_list");
    if (file) std::getline(file, siblings);
    cores.insert(siblings);
  }
  return static_cast<int>(cores.size());
}

// The folder of this process in a cgroup hierarchy ("" for version 2), as /proc/self/cgroup names it.
std::string cgroup_path(const std::string& controller) {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controllers == "," + controller + "," ||
        (!controller.empty() && controllers.find("," + controller + ",") != std::string::npos))
      return line.substr(second + 1);
  }
  return "";
}

// CPUs' worth of time that the cgroup grants, or 0 where it sets no limit. Inside a container the mount shows the
// container's own group at its top, so both places are read.
double cgroup_quota() {
  for (const std::string& folder : {cgroup_path(""), std::string()}) {
    std::ifstream file("/sys/fs/cgroup" + folder + "/cpu.max");
    std::string quota;
    double period = 0;
    if (file >> quota >> period && quota != "max" && period > 0) return std::stod(quota) / period;
  }
  for (const std::string& folder : {cgroup_path("cpu"), std::string()}) {
    std::ifstream quota_file("/sys/fs/cgroup/cpu" + folder + "/cpu.cfs_quota_us");
    std::ifstream period_file("/sys/fs/cgroup/cpu" + folder + "/cpu.cfs_period_us");
    double quota = 0, period = 0;
    if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) return quota / period;
  }
  return 0;
}

#else

int cores_in_affinity() { return 0; }
double cgroup_quota() { return 0; }

#endif

}  // namespace

int available_cores() {
  int cores = cores_in_affinity();
  if (cores == 0) cores = static_cast<int>(std::thread::hardware_concurrency());
  const double quota = cgroup_quota();
  if (quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  return std::max(cores, 1);
}

}  // namespace taper
