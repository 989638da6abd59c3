// A fake of NVML with one GPU, at 0000:1B:00.0, whose clocks rise and fall with every reading.
#define PUBLIC __attribute__((visibility("default")))

static int open, reads;

PUBLIC int nvmlInit_v2(void) { return open = 1, 0; }
PUBLIC int nvmlShutdown(void) { return open = 0, 0; }
PUBLIC int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** device) {
  const char* known = "0000:1B:00.0";
  while (*known && *known == *bus) ++known, ++bus;
  *device = &open;
  return !open || *known != *bus ? 6 : 0;  // NVML_ERROR_NOT_FOUND
}
PUBLIC int nvmlDeviceGetClockInfo(void* device, int clock, unsigned* mhz) {
  if (!open || device != &open) return 1;  // NVML_ERROR_UNINITIALIZED
  *mhz = clock == 1 ? (reads++ % 3 == 1 ? 1200 : 1980) : clock == 2 ? 3201 : 0;
  return 0;
}
