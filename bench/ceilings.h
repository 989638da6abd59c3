#pragma once
// What the device in use can do at best, measured once in the process that measures everything else.

namespace lightmoe::bench {

struct Ceilings {
  double f32_flop = 0,
         bf16_flop = 0;  // per second: large square products, the best backend (2048 on a CPU, 8192 on a GPU: cuBLAS)
  double read_bytes =
      0;  // per second: reading memory larger than the caches (on a GPU: what a large copy reads and writes)
  double copy_bytes = 0;  // per second, read and written: a copy larger than the caches
};
const Ceilings& measured_ceilings();

}  // namespace lightmoe::bench
