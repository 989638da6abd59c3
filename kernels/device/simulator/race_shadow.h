#pragma once
// Shadow of shared and global memory in the race build: one cell a byte (with larger cells, neighbours of a byte each look like races).

#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator::race {

enum Flag : uint8_t {
  kAllocated = 1,
  kInitialised = 2,
  kInFlight = 4,  // destination of a copy that nobody has waited for
  kAtomicWrite = 8,
  kAtomicReads = 16,   // all reads remembered were atomic
  kOrdinaryStore = 32  // written through the generic proxy: wgmma needs a fence before it reads
};

struct Cell {
  uint32_t write_clock, write_block, write_place;
  uint32_t read_clock[2], read_block, read_place;
  uint16_t writer, reader[2];
  uint8_t flags, wgmma_reads;  // wgmma operations in flight that read it
};

// Places are addresses within the executable, or, with the high bit, numbers of a Site.
uint32_t place_of(Site site);
std::string text_of_place(uint32_t place);

// The cell of an address in shared memory (shared set) or in the simulated device's memory; null for anything else.
struct Where {
  Cell* cell = nullptr;
  bool shared = false;
};
Where find(const void* p);
std::string text_of_address(const void* p);
void reset_shared(uint32_t bytes);  // all of them allocated and uninitialised

struct Report {
  const char* kind;
  const Thread* thread;
  const void* address;
  uint32_t place;
  uint32_t other_place = 0;  // 0: there is none
  int other_thread = 0;
  uint32_t other_block = 0;  // its number in the grid
};
void add_report(const Report& report);
uint64_t num_reports();  // since the launch began

Block* block_of_race();  // the block that runs; null outside kernels

}  // namespace lightmoe::simulator::race
