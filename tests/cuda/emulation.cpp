// What a test asks of the emulation.
#include "emulation.h"

// Bytes read and written since the last call, how many of the accesses had 128 bits, and sectors.
extern "C" __attribute__((visibility("default"))) void emulated_traffic(int64_t* found) {
  found[0] = emulation::traffic.read.exchange(0);
  found[1] = emulation::traffic.written.exchange(0);
  found[2] = emulation::traffic.vectors.exchange(0);
  found[3] = emulation::traffic.sectors.exchange(0);
}
