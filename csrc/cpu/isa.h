// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pyprune {

// All that this machine can run, the best first.
std::vector<const Kernels*> available_kernels();

// The kernels in use: the best, or those that PYPRUNE_CPU_ISA or `use_kernels` named.
const Kernels& current_kernels();

// Use the kernels called `name`, or the best for an empty name. Throws std::runtime_error naming those available.
void use_kernels(const std::string& name);

}  // namespace pyprune
