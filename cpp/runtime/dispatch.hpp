// The one table of kernels in use.
#pragma once

#include <string>
#include <vector>

#include "taper/kernels.hpp"

namespace taper {

// The table in use: the best that processor and build allow, or the one that TAPER_ISA names; chosen on first use.
// Throws std::invalid_argument when TAPER_ISA names one that cannot run here.
const Kernels& kernels();

// Switches the table. Throws std::invalid_argument for an unknown name or a set that cannot run here.
void use_isa(const std::string& name);

// Names that can run here, plainest first. Not those that are only for tests.
std::vector<std::string> available_isas();

}  // namespace taper
