// Numbers on the device that blocks count on to find out who comes last.
#pragma once

#include "start.h"

namespace pyprune {

// `count` zeros that every launch leaves zero, for one call on `stream` of the current device. Calls on one stream
// follow each other, and share theirs. A call under capture gets its own for ever: its graph may be replayed on any
// stream. Raises Refusal when there are none left, or no memory.
uint32_t* tickets(int device, Stream stream, int32_t count);

}  // namespace pyprune
