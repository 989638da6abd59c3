// state.json of a step checkpoint: any bytes end in Error or in a state that its own text gives back.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "loaders/json.h"
#include "model/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lightmoe;
  try {
    const TrainingState state = parse_state({reinterpret_cast<const char*>(data), size}, "state.json");
    const std::string text = state_to_json(state);
    if (state_to_json(parse_state(text, "again")) != text) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
