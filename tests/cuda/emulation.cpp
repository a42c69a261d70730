// What a test asks of the emulation.
#include "emulation.h"

// Bytes read and written since the last call, and how many of the accesses had 128 bits.
extern "C" __attribute__((visibility("default"))) void emulated_traffic(int64_t* read_written_vectors) {
  read_written_vectors[0] = emulation::traffic.read.exchange(0);
  read_written_vectors[1] = emulation::traffic.written.exchange(0);
  read_written_vectors[2] = emulation::traffic.vectors.exchange(0);
}
