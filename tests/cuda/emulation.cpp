// What a test asks of the emulation.
#include "runtime.h"

// Bytes read and written since the last call, how many of the accesses had 128 bits, sectors, launches, and
// blocks and threads of the last one.
extern "C" __attribute__((visibility("default"))) void emulated_traffic(int64_t* found) {
  found[0] = emulation::traffic.read.exchange(0);
  found[1] = emulation::traffic.written.exchange(0);
  found[2] = emulation::traffic.vectors.exchange(0);
  found[3] = emulation::traffic.sectors.exchange(0);
  found[4] = emulation::traffic.launches.exchange(0);
  found[5] = emulation::traffic.blocks;
  found[6] = emulation::traffic.threads;
}

// How often each of so many blocks has asked for a tile since the last call.
extern "C" __attribute__((visibility("default"))) void emulated_draws(int64_t* found, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) found[b] = emulation::traffic.draws[b].exchange(0);
}

// Forget that a cooperative launch was refused.
extern "C" __attribute__((visibility("default"))) void emulated_forget() { dbmtl::refusals[0] = false; }
