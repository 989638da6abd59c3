#include "cli/extension_flags.h"

#include <fmt/core.h>

#include "compress/extension_clusters.h"
#include "model/extend.h"

namespace lightmoe::cli {

void add_extension_flags(Flags& app, ExtensionFlags& f) {
  std::string kinds;
  for (const ExtensionKind& kind : extension_kinds())
    kinds += fmt::format("{}{}", kinds.empty() ? "" : ", ", parse_extension(kind.name).text());
  app.add_option("--extend", f.extend, "give every MoE block an extension, KIND or KIND:setting=number,..: " + kinds)
      ->group("Extension");
  app.add_option("--extend-clusters", f.clusters,
                 "statistics file (calibrate --sample-inputs) whose inputs' clusters mor1e starts with")
      ->group("Extension");
}

void extend(Olmoe& model, const ExtensionFlags& f, uint64_t seed) {
  check(!f.extend.empty() || f.clusters.empty(), ErrorKind::kUsage, "--extend-clusters serves --extend mor1e");
  if (f.extend.empty()) return;
  extend_model(model, parse_extension(f.extend), seed);
  if (!f.clusters.empty()) start_clusters(model, load_statistics(f.clusters), seed);
}

}  // namespace lightmoe::cli
