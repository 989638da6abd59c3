/* A tool in Nsight's place: NVTX loads it from NVTX_INJECTION64_PATH, and it writes what it is told, a line each, into the file that
 * LIGHTMOE_TEST_NVTX names. For tests/trace_test.cpp. Empty where the toolkit's headers are not. */
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>

static FILE* out;

static nvtxDomainHandle_t create(const char* name) {
  fprintf(out, "domain %s\n", name);
  return (nvtxDomainHandle_t)1;
}
static void category(nvtxDomainHandle_t domain, uint32_t id, const char* name) {
  (void)domain;
  fprintf(out, "category %u %s\n", id, name);
}
static nvtxStringHandle_t register_string(nvtxDomainHandle_t domain, const char* text) {
  static intptr_t count = 0;
  (void)domain;
  fprintf(out, "string %d %s\n", (int)++count, text);
  return (nvtxStringHandle_t)count;
}
static int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* e) {
  (void)domain;
  fprintf(out, "push %d category %u", (int)(intptr_t)e->message.registered, e->category);
  if (e->payloadType == NVTX_PAYLOAD_TYPE_INT64) fprintf(out, " payload %lld", (long long)e->payload.llValue);
  fprintf(out, "\n");
  return 0;
}
static int pop(nvtxDomainHandle_t domain) {
  (void)domain;
  fprintf(out, "pop\n");
  fflush(out);
  return 0;
}

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  const NvtxExportTableCallbacks* callbacks = (const NvtxExportTableCallbacks*)export_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable table;
  unsigned size;
  if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) != 1) return 0;
  out = fopen(getenv("LIGHTMOE_TEST_NVTX"), "w");
  if (out == NULL) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create;
  *table[NVTX_CBID_CORE2_DomainNameCategoryA] = (NvtxFunctionPointer)category;
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)register_string;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
#endif
