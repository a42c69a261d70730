// How tiles are dealt out to blocks. Multiprocessors are not equally fast: the first tiles go by turns, the rest to whoever
// asks. A block's turns have their sums in one slot, what is drawn with a ticket in the ticket's own, and slots are added
// in their order: the same bits whoever drew.
#pragma once
#include <algorithm>

#include "device.cuh"

namespace dbmtl {

struct Deal {
  int64_t tiles, turns;  // the first `turns` tiles go by turns
  int span, tickets;     // tiles of a ticket, side by side; at most kTickets a block
};

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Seven eighths of the rounds go by turns, `least` at least: few tiles need no counter.
inline Deal deal_out(int64_t tiles, int blocks, int64_t least = 1) {
  const int64_t turns = std::max(least, tiles / blocks * 7 / 8) * blocks, rest = std::max<int64_t>(tiles - turns, 0);
  const int64_t span = std::max<int64_t>(divided_up(rest, int64_t(blocks) * kTickets), 1);
  return {tiles, turns, int(span), int(divided_up(rest, span))};
}

// work(tile) for every tile of this block, done(slot) after its turns and after each ticket. The counter goes back to zero
// by itself, as every block draws once in vain.
template <class Work, class Done>
__device__ inline void deal(const Deal& d, unsigned* drawn, Work work, Done done) {
  __shared__ unsigned ticket;
  int64_t tile = blockIdx.x, end = d.turns < d.tiles ? d.turns : d.tiles, step = gridDim.x;
  for (unsigned slot = blockIdx.x;; slot = gridDim.x + ticket) {
#pragma unroll 1
    for (; tile < end; tile += step) work(tile);
    done(slot);
    if (d.tickets == 0) return;
    __syncthreads();  // all have read the last ticket
    if (threadIdx.x == 0) ticket = atomicInc(drawn, unsigned(d.tickets) + gridDim.x - 1);
    __syncthreads();
    if (ticket >= unsigned(d.tickets)) return;
    tile = d.turns + int64_t(ticket) * d.span;
    end = tile + d.span < d.tiles ? tile + d.span : d.tiles;
    step = 1;
  }
}

// Slots in use after a deal.
__device__ inline int slots_used(const Deal& d) { return int(gridDim.x) + d.tickets; }

}  // namespace dbmtl
