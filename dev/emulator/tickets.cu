// Uses integer atomics, which no product kernel uses yet. A block counts its threads in shared memory; its last thread
// takes a ticket from a counter in global memory.
#include "../../csrc/cuda/device.cuh"

namespace {

// tickets [blocks]: the order in which the blocks took their tickets; counter: one number, initially 0.
void take_tickets(int* tickets, int* counter) {
  int* arrived = se::cuda::shared_memory<int>();
  if (threadIdx.x == 0) *arrived = 0;
  __syncthreads();
  if (atomicAdd(arrived, 1) == se::kThreads - 1) se::cuda::write_global(tickets + blockIdx.x, atomicAdd(counter, 1));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void emulator_tickets(int* tickets, int* counter, int blocks) {
  const auto grid = static_cast<unsigned>(blocks);
  emulator::run({grid, 1, 1}, {se::kThreads, 1, 1}, 1, sizeof(int), [&] { take_tickets(tickets, counter); });
}
